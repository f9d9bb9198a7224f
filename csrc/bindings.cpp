// The compiled module: the only file that knows Python, beside bindings_training.cpp, facts.cpp and watch.cpp. Shapes, strides and pointers
// come in as integers; the Python side has checked the tensors that they belong to. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <optional>

#include "cpu/convolution.h"
#include "cpu/fingerprint.h"
#include "cpu/max_pool.h"
#include "cpu/passes.h"
#include "cpu/program.h"
#include "cpu/workspace.h"
#include "facts.h"
#include "python_shapes.h"
#include "watch.h"
#include "words.h"

namespace py = pybind11;
namespace fr = fused_resnet;
using fr::i64;
using fr::dtype;
using fr::Four;
using fr::Pointer;
using fr::request;
using fr::Two;
using fr::in;
using fr::out;
using fr::strides;

void bind_training(py::module_& m);  // bindings_training.cpp

namespace {

constexpr int kInterface = 11;  // fused_resnet/_extension.py holds the same number

std::unique_ptr<fr::Convolution> convolution(const std::string& type, const Four& input, const Four& weight, const Four& output,
                            const Two& stride, const Two& pad, const Two& dilation, const Four& input_strides,
                            const Four& output_strides, const std::optional<Four>& shortcut_strides, bool has_bias,
                            bool relu, int threads, const std::string& algorithm, bool strict) {
  const fr::ConvShape s = fr::conv_shape(input, weight, output, stride, pad, dilation, input_strides, output_strides,
                                         shortcut_strides, has_bias, relu);
  return fr::Convolution::make(s, dtype(type), threads, request(algorithm, strict));
}

fr::Layer layer(const Four& weight, const Two& output, const Two& stride, const Two& pad, const Two& dilation, bool has_bias, bool relu) {
  fr::Layer l;
  l.k = weight[0];
  l.r = weight[2];
  l.s = weight[3];
  l.p = output[0];
  l.q = output[1];
  l.stride_h = stride[0];
  l.stride_w = stride[1];
  l.pad_top = pad[0];
  l.pad_left = pad[1];
  l.dilation_h = dilation[0];
  l.dilation_w = dilation[1];
  l.has_bias = has_bias;
  l.relu = relu;
  return l;
}

// The addresses of a program's packed weights and biases; whoever makes them keeps the memory.
struct Weights {
  Weights(const std::vector<Pointer>& packed, const std::vector<Pointer>& biases) {
    if (packed.size() != biases.size()) throw std::invalid_argument("as many packed weights as biases");
    for (const Pointer p : packed) weight.push_back(in(p));
    for (const Pointer p : biases) bias.push_back(in(p));
  }
  std::vector<const void*> weight, bias;
};

fr::ProgramOperands operands_of(const fr::Program& program, const Weights& weights, const void* const* inputs, Pointer output) {
  if (weights.weight.size() != program.convolutions()) throw std::invalid_argument("the weights of another program");
  return {inputs, weights.weight.data(), weights.bias.data(), out(output)};
}

// rows: (kind, place, name, value) as fused_resnet/graph/facts.py makes them; missing: what stands for no value there.
std::unique_ptr<fr::Facts> facts(const std::vector<std::tuple<int, py::handle, py::handle, py::handle>>& rows, py::handle missing) {
  std::vector<fr::Facts::Fact> found;
  for (const auto& [kind, place, name, value] : rows) {
    if (kind < 0 || kind > static_cast<int>(fr::FactKind::kind)) throw std::invalid_argument("no such kind of fact");
    found.push_back({static_cast<fr::FactKind>(kind), place.is_none() ? nullptr : place.ptr(), name.ptr(),
                     value.is(missing) ? nullptr : value.ptr()});
  }
  return std::make_unique<fr::Facts>(std::move(found));
}

// rows: (tensor, class, version, address, shape, strides, dtype, DLPack's code and bits of it). tensor: torch.Tensor. exchange: its capsule
// of DLPack's C interface, or None. on_gpu: where all of them are.
std::unique_ptr<fr::Watch> watch(
    const std::vector<std::tuple<py::handle, py::type, long, Pointer, py::tuple, py::tuple, py::handle, std::pair<int, int>>>& rows,
    const py::object& tensor, const py::object& exchange, bool on_gpu) {
  // Kept for good, as the class is.
  static const fr::TensorQuestions questions = [&tensor] {
    const auto of_class = [&tensor](const char* name) { return py::object(tensor.attr(name)).release().ptr(); };
    return fr::TensorQuestions{nullptr,
                               of_class("data_ptr"),
                               of_class("stride"),
                               of_class("_version"),
                               of_class("shape"),
                               of_class("dtype"),
                               of_class("requires_grad"),
                               fr::dlpack::kCpu};
  }();
  fr::TensorQuestions ask = questions;
  if (on_gpu) ask.device_type = fr::dlpack::kCuda;
  if (!exchange.is_none()) ask.describe = fr::dlpack::describe_of(exchange.ptr());
  std::vector<fr::Watch::Row> all;
  for (const auto& [t, cls, version, address, shape, strides, dtype, type] : rows) {
    std::vector<std::int64_t> layout;
    for (const py::tuple& numbers : {shape, strides}) {
      for (const py::handle n : numbers) layout.push_back(n.cast<std::int64_t>());
    }
    const fr::dlpack::DataType as_dlpack{static_cast<std::uint8_t>(type.first), static_cast<std::uint8_t>(type.second), 1};
    all.push_back({t.ptr(), reinterpret_cast<PyTypeObject*>(cls.ptr()), version, address, shape.ptr(), strides.ptr(), dtype.ptr(),
                   std::move(layout), as_dlpack});
  }
  return std::make_unique<fr::Watch>(std::move(all), ask);
}

// GFLOP/s of one thread doing nothing but float32 FMAs in the instruction set in force: the best of runs over `seconds`.
double measure_fma_peak(double seconds) {
  using clock = std::chrono::steady_clock;
  const auto& table = fr::current_table();
  double best = 0;
  const auto start = clock::now();
  do {
    const auto t0 = clock::now();
    const double flops = table.fma_peak(100000);
    best = std::max(best, flops / std::chrono::duration<double>(clock::now() - t0).count());
  } while (std::chrono::duration<double>(clock::now() - start).count() < seconds);
  return best / 1e9;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fused_resnet. Internal: the checks are in the Python files.";
  m.attr("INTERFACE") = kInterface;
  m.attr("BUILD") = std::map<std::string, std::string>{
      {"compiler", __VERSION__}, {"openmp", std::to_string(_OPENMP)}, {"pybind11", PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR)}};

  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const auto* table : fr::available_tables()) names.emplace_back(table->isa);
    return names;
  });
  m.def("isa", [] { return std::string(fr::current_table().isa); });
  m.def("set_isa", &fr::set_isa, py::arg("name"));
  m.def("cache_sizes", [] {
    const auto& c = fr::cache_sizes();
    return std::map<std::string, i64>{{"l1d", c.l1d}, {"l2", c.l2}, {"l3", c.l3}};
  });
  m.def("release_workspaces", &fr::Workspace::release, "Frees the scratch memory that is kept from call to call.");
  m.def("measure_fma_peak", &measure_fma_peak, py::arg("seconds"), py::call_guard<py::gil_scoped_release>());

  py::class_<fr::Convolution>(m, "Convolution")
      .def(py::init(&convolution), py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("output"),
           py::arg("stride"), py::arg("pad"), py::arg("dilation"), py::arg("input_strides"), py::arg("output_strides"),
           py::arg("shortcut_strides"), py::arg("has_bias"), py::arg("relu"), py::arg("threads"),
           py::arg("algorithm") = "auto", py::arg("strict") = false)
      .def(
          "run",
          [](const fr::Convolution& c, Pointer x, Pointer weight, Pointer bias, Pointer shortcut, Pointer y) {
            return c.run({in(x), in(weight), in(bias), in(shortcut), out(y), nullptr, {}});
          },
          py::arg("input"), py::arg("packed_weight"), py::arg("bias"), py::arg("shortcut"), py::arg("output"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "pack",
          [](const fr::Convolution& c, Pointer weight, const Four& stride, Pointer packed, Pointer joined,
             const Four& joined_stride) {
            return c.pack({in(weight), strides(stride)}, {in(joined), strides(joined_stride)}, out(packed));
          },
          py::arg("weight"), py::arg("strides"), py::arg("packed_weight"), py::arg("joined_weight") = 0,
          py::arg("joined_strides") = Four{}, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("packed_bytes", &fr::Convolution::packed_bytes)
      .def_property_readonly("packing", &fr::Convolution::packing)
      .def_property_readonly("workspace_bytes", &fr::Convolution::workspace_bytes)
      .def_property_readonly("isa", &fr::Convolution::isa)
      .def_property_readonly("algorithm", [](const fr::Convolution& c) { return fr::word(c.choice().algorithm); })
      .def("describe", &fr::Convolution::describe)
      .def_property_readonly("reason", [](const fr::Convolution& c) { return c.choice().reason; });

  bind_training(m);
  py::class_<fr::Network>(m, "Network")
      .def(py::init<i64>(), py::arg("images"))
      .def(
          "input",
          [](fr::Network& n, i64 channels, i64 h, i64 w, const Four& stride) { return n.input(channels, h, w, strides(stride)); },
          py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("strides"))
      .def(
          "convolution",
          [](fr::Network& n, int value, int shortcut, const Four& weight, const Two& output, const Two& stride, const Two& pad,
             const Two& dilation, bool has_bias, bool relu) {
            return n.convolution(value, layer(weight, output, stride, pad, dilation, has_bias, relu), shortcut);
          },
          py::arg("value"), py::arg("shortcut"), py::arg("weight"), py::arg("output"), py::arg("stride"), py::arg("pad"),
          py::arg("dilation"), py::arg("has_bias"), py::arg("relu"))
      .def(
          "max_pool",
          [](fr::Network& n, int value, const Two& output, const Two& kernel, const Two& stride, const Two& pad) {
            fr::PoolShape s;
            s.p = output[0], s.q = output[1], s.kernel_h = kernel[0], s.kernel_w = kernel[1];
            s.stride_h = stride[0], s.stride_w = stride[1], s.pad_top = pad[0], s.pad_left = pad[1];
            return n.max_pool(value, s);
          },
          py::arg("value"), py::arg("output"), py::arg("kernel"), py::arg("stride"), py::arg("pad"))
      .def("mean_pool", &fr::Network::mean_pool, py::arg("value"))
      .def("zero_pad", &fr::Network::zero_pad, py::arg("value"), py::arg("channels"), py::arg("before"), py::arg("stride_h"),
           py::arg("stride_w"))
      .def("section", &fr::Network::section);
  py::class_<Weights>(m, "Weights")
      .def(py::init<const std::vector<Pointer>&, const std::vector<Pointer>&>(), py::arg("packed"), py::arg("biases"));
  py::class_<fr::Workspace>(m, "Workspace").def(py::init<i64>(), py::arg("bytes"));
  py::class_<fr::Program>(m, "Program")
      .def(py::init([](const fr::Network& network, const Four& output_strides, const std::string& type, int threads,
                       const std::string& algorithm, bool strict) {
             return std::make_unique<fr::Program>(network, strides(output_strides), dtype(type), threads, request(algorithm, strict));
           }),
           py::arg("network"), py::arg("output_strides"), py::arg("dtype"), py::arg("threads"), py::arg("algorithm") = "auto",
           py::arg("strict") = false)
      .def(
          "run",
          [](const fr::Program& p, const Weights& weights, Pointer first, Pointer second, Pointer output,
             const fr::Guard* guard) -> std::optional<bool> {
            const void* const inputs[] = {in(first), in(second)};
            const fr::ProgramOperands operands = operands_of(p, weights, inputs, output);
            py::gil_scoped_release release;
            return guard == nullptr ? p.run(operands) : p.run_if(*guard, operands);
          },
          py::arg("weights"), py::arg("input"), py::arg("second_input"), py::arg("output"), py::arg("guard") = nullptr)
      .def(
          "run_stage",
          [](const fr::Program& p, std::size_t i, const Weights& weights, Pointer first, Pointer second, Pointer output,
             const fr::Workspace& workspace) {
            const void* const inputs[] = {in(first), in(second)};
            const fr::ProgramOperands operands = operands_of(p, weights, inputs, output);
            py::gil_scoped_release release;
            return p.run_stage(i, operands, workspace.data());
          },
          py::arg("index"), py::arg("weights"), py::arg("input"), py::arg("second_input"), py::arg("output"), py::arg("workspace"))
      .def("stages",
           [](const fr::Program& p) {
             std::vector<std::pair<std::vector<int>, std::string>> found;
             for (const fr::Program::Stage& stage : p.stages()) found.emplace_back(stage.nodes, stage.what);
             return found;
           })
      .def(
          "convolution",
          [](const fr::Program& p, i64 i) {
            if (i < 0 || i >= i64(p.convolutions())) throw py::index_error("a program has no such convolution");
            return p.convolution(std::size_t(i));
          },
          py::arg("index"), py::return_value_policy::reference_internal)
      .def("joined_to", &fr::Program::joined_to, py::arg("index"))
      .def_property_readonly("convolutions", &fr::Program::convolutions)
      .def_property_readonly("threads", &fr::Program::threads)
      .def_property_readonly("workspace_bytes", &fr::Program::workspace_bytes)
      .def("describe", &fr::Program::describe);

  m.def(
      "bias_add_relu",
      [](const std::string& type, const Four& shape, const Four& y_strides, const Four& x_strides,
         const Four& shortcut_strides, bool relu, bool wide_input, Pointer x, Pointer bias, Pointer shortcut, Pointer y,
         int threads) {
        const auto s = fr::pass_shape(dtype(type), shape, y_strides, x_strides, shortcut_strides, relu, wide_input);
        py::gil_scoped_release release;
        fr::bias_add_relu(s, in(x), in(bias), in(shortcut), out(y), threads);
      },
      py::arg("dtype"), py::arg("shape"), py::arg("output_strides"), py::arg("input_strides"),
      py::arg("shortcut_strides"), py::arg("relu"), py::arg("wide_input"), py::arg("input"), py::arg("bias"),
      py::arg("shortcut"), py::arg("output"), py::arg("threads"));
  py::class_<fr::MaxPool>(m, "MaxPool")
      .def_property_readonly_static("MOST_TAPS", [](const py::object&) { return fr::MaxPool::kMostTaps; })
      .def(py::init([](const std::string& type, const Four& input, const Four& output, const Two& kernel, const Two& stride, const Two& pad,
                       const Four& input_strides, const Four& output_strides, bool channels, int threads) {
             return std::make_unique<fr::MaxPool>(
                 fr::pool_shape(input, output, kernel, stride, pad, input_strides, output_strides, channels), dtype(type), threads);
           }),
           py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("kernel"), py::arg("stride"), py::arg("pad"),
           py::arg("input_strides"), py::arg("output_strides"), py::arg("channels"), py::arg("threads"))
      .def(
          "run", [](const fr::MaxPool& pool, Pointer x, Pointer y) { pool.run({in(x), nullptr, nullptr, nullptr, out(y), nullptr, {}}); },
          py::arg("input"), py::arg("output"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "relu_backward",
      [](const std::string& type, const Four& shape, const Four& result_strides, const Four& grad_strides,
         const Four& output_strides, Pointer grad, Pointer output, Pointer result, Pointer bias_grad, int threads) {
        const auto s = fr::pass_shape(dtype(type), shape, result_strides, grad_strides, output_strides, true, false);
        py::gil_scoped_release release;
        fr::relu_backward(s, in(grad), in(output), out(result), out(bias_grad), threads);
      },
      py::arg("dtype"), py::arg("shape"), py::arg("result_strides"), py::arg("grad_strides"), py::arg("output_strides"),
      py::arg("grad"), py::arg("output"), py::arg("result"), py::arg("bias_grad"), py::arg("threads"));
  py::class_<fr::Facts>(m, "Facts")
      .def(py::init(&facts), py::arg("rows"), py::arg("missing"))
      .def("include", [](fr::Facts& f, fr::Facts& other, py::dict owner) { f.include(other, owner.ptr()); }, py::arg("other"), py::arg("owner"))
      .def("broken", [](fr::Facts& f, py::dict owner) { return f.broken(owner.ptr()); }, py::arg("owner"));
  py::class_<fr::Watch>(m, "Watch")
      .def(py::init(&watch), py::arg("rows"), py::arg("tensor"), py::arg("exchange"), py::arg("on_gpu"))
      .def("first_changed", &fr::Watch::first_changed, py::arg("grad"));
  py::class_<fr::Guard>(m, "Guard")
      .def(py::init([](Pointer data, i64 bytes, i64 most) {
             auto guard = std::make_unique<fr::Guard>();
             guard->add(in(data), bytes, most);
             return guard;
           }),
           py::arg("data"), py::arg("bytes"), py::arg("most"))
      .def(py::init([](const std::vector<const fr::Guard*>& guards) {
             auto guard = std::make_unique<fr::Guard>();
             for (const fr::Guard* other : guards) guard->add(*other);
             return guard;
           }),
           py::arg("guards"))
      .def("holds", [](const fr::Guard& guard) { return guard.holds(); });
}
