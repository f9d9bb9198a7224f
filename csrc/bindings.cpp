// The compiled module: the only file that knows Python, beside facts.cpp. Shapes, strides and pointers come in as integers; the Python side has
// checked the tensors that they belong to. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <optional>

#include "cpu/block.h"
#include "cpu/convolution.h"
#include "cpu/fingerprint.h"
#include "cpu/max_pool.h"
#include "cpu/passes.h"
#include "facts.h"
#include "python_shapes.h"

namespace py = pybind11;
namespace fr = fused_resnet;
using fr::i64;
using fr::Four;
using fr::Pointer;
using fr::Two;
using fr::in;
using fr::out;
using fr::strides;

namespace {

constexpr int kInterface = 6;  // fused_resnet/_extension.py holds the same number

fr::DType dtype(const std::string& name) {
  if (name == "float32") return fr::DType::float32;
  if (name == "float64") return fr::DType::float64;
  if (name == "bfloat16") return fr::DType::bfloat16;
  throw std::invalid_argument("dtype must be float32, float64 or bfloat16, got '" + name + "'");
}

fr::Request request(const std::string& algorithm, bool strict) {
  fr::Request r;
  r.strict = strict;
  r.automatic = algorithm == "auto";
  if (algorithm == "direct" || r.automatic) {
    r.algorithm = fr::Algorithm::direct;
  } else if (algorithm == "winograd2") {
    r.algorithm = fr::Algorithm::winograd2;
  } else if (algorithm == "winograd4") {
    r.algorithm = fr::Algorithm::winograd4;
  } else {
    throw std::invalid_argument("algorithm must be auto, direct, winograd2 or winograd4, got '" + algorithm + "'");
  }
  return r;
}

std::unique_ptr<fr::Convolution> convolution(const std::string& type, const Four& input, const Four& weight, const Four& output,
                            const Two& stride, const Two& pad, const Two& dilation, const Four& input_strides,
                            const Four& output_strides, const std::optional<Four>& shortcut_strides, bool has_bias,
                            bool relu, int threads, const std::string& algorithm, bool strict) {
  const fr::ConvShape s = fr::conv_shape(input, weight, output, stride, pad, dilation, input_strides, output_strides,
                                         shortcut_strides, has_bias, relu);
  return fr::Convolution::make(s, dtype(type), threads, request(algorithm, strict));
}

// (weight [K, C, R, S], output [N, K, P, Q], stride, pad, dilation, has_bias, relu)
using LayerTuple = std::tuple<Four, Four, Two, Two, Two, bool, bool>;

fr::Layer layer(const LayerTuple& t) {
  const auto& [weight, output, stride, pad, dilation, has_bias, relu] = t;
  fr::Layer l;
  l.k = weight[0];
  l.r = weight[2];
  l.s = weight[3];
  l.p = output[2];
  l.q = output[3];
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

std::unique_ptr<fr::Block> block(const std::string& type, const Four& input, const Four& input_strides,
                                 const std::vector<LayerTuple>& main, const std::optional<LayerTuple>& projection,
                                 const std::string& shortcut, const Four& shortcut_strides, const Four& output_strides,
                                 int threads, const std::string& algorithm, bool strict) {
  fr::BlockShape s;
  s.n = input[0];
  s.c = input[1];
  s.h = input[2];
  s.w = input[3];
  s.x = strides(input_strides);
  s.y = strides(output_strides);
  s.shortcut = strides(shortcut_strides);
  for (const LayerTuple& t : main) s.main.push_back(layer(t));
  if (projection) {
    s.kind = fr::Shortcut::projection;
    s.projection = layer(*projection);
  } else if (shortcut == "identity") {
    s.kind = fr::Shortcut::identity;
  } else if (shortcut == "external") {
    s.kind = fr::Shortcut::external;
  }
  return std::make_unique<fr::Block>(s, dtype(type), threads, request(algorithm, strict));
}

const char* algorithm_name(const fr::Convolution& c) {
  switch (c.choice().algorithm) {
    case fr::Algorithm::winograd2: return "winograd2";
    case fr::Algorithm::winograd4: return "winograd4";
    default: return "direct";
  }
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
  m.def("measure_fma_peak", &measure_fma_peak, py::arg("seconds"), py::call_guard<py::gil_scoped_release>());

  py::class_<fr::Convolution>(m, "Convolution")
      .def(py::init(&convolution), py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("output"),
           py::arg("stride"), py::arg("pad"), py::arg("dilation"), py::arg("input_strides"), py::arg("output_strides"),
           py::arg("shortcut_strides"), py::arg("has_bias"), py::arg("relu"), py::arg("threads"),
           py::arg("algorithm") = "auto", py::arg("strict") = false)
      .def(
          "run",
          [](const fr::Convolution& c, Pointer x, Pointer weight, Pointer bias, Pointer shortcut, Pointer y) {
            return c.run({in(x), in(weight), in(bias), in(shortcut), out(y)});
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
      .def_property_readonly("algorithm", &algorithm_name)
      .def("describe", &fr::Convolution::describe)
      .def_property_readonly("reason", [](const fr::Convolution& c) { return c.choice().reason; });

  py::class_<fr::Block>(m, "Block")
      .def(py::init(&block), py::arg("dtype"), py::arg("input"), py::arg("input_strides"), py::arg("main"),
           py::arg("projection"), py::arg("shortcut"), py::arg("shortcut_strides"), py::arg("output_strides"),
           py::arg("threads"), py::arg("algorithm") = "auto", py::arg("strict") = false)
      .def(
          "run",
          [](const fr::Block& b, Pointer x, const std::vector<Pointer>& weights, const std::vector<Pointer>& biases,
             Pointer shortcut, Pointer y) {
            fr::BlockOperands o;
            o.x = in(x);
            for (const Pointer p : weights) o.weight.push_back(in(p));
            for (const Pointer p : biases) o.bias.push_back(in(p));
            o.shortcut = in(shortcut);
            o.y = out(y);
            return b.run(o);
          },
          py::arg("input"), py::arg("packed_weights"), py::arg("biases"), py::arg("shortcut"), py::arg("output"),
          py::call_guard<py::gil_scoped_release>())
      .def("convolution", &fr::Block::convolution, py::arg("index"), py::return_value_policy::reference_internal)
      .def_property_readonly("convolutions", &fr::Block::convolutions)
      .def_property_readonly("joined", &fr::Block::joined)
      .def_property_readonly("workspace_bytes", &fr::Block::workspace_bytes)
      .def("describe", &fr::Block::describe);

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
             const fr::PoolShape s{input[0], input[1],  input[2],  input[3], output[2], output[3],
                                   kernel[0], kernel[1], stride[0], stride[1], pad[0],   pad[1],
                                   strides(input_strides), strides(output_strides), channels};
             return std::make_unique<fr::MaxPool>(s, dtype(type), threads);
           }),
           py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("kernel"), py::arg("stride"), py::arg("pad"),
           py::arg("input_strides"), py::arg("output_strides"), py::arg("channels"), py::arg("threads"))
      .def(
          "run",
          [](const fr::MaxPool& pool, Pointer x, Pointer y) {
            fr::Operands o;
            o.x = in(x);
            o.y = out(y);
            pool.run(o);
          },
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
      .def("first_broken", [](fr::Facts& f, py::dict owner) { return f.first_broken(owner.ptr()); }, py::arg("owner"));
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
      .def("holds", &fr::Guard::holds);
}
