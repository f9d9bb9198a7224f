// The compiled CUDA module, and its twin for the host (-DFR_HOST_MODULE), in which the tests run the general kernels without a
// GPU: the only CUDA file that knows Python. As in ../bindings.cpp: integers in, checked by the Python side, the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "../python_shapes.h"
#include "convolution.h"
#include "device.h"
#include "sequence.h"

namespace py = pybind11;
namespace fr = fused_resnet;
namespace cu = fused_resnet::cuda;
using fr::i64;
using fr::Four;
using fr::Pointer;
using fr::Two;
using fr::in;
using fr::out;
using fr::strides;
using JoinedTuple = std::tuple<i64, Two, Four>;  // channels, stride, strides of the input

namespace {

constexpr int kInterface = 2;  // fused_resnet/_extension.py holds the same number

fr::DType dtype(const std::string& name) {
  for (const fr::DType d : {fr::DType::float32, fr::DType::float64, fr::DType::bfloat16, fr::DType::float16}) {
    if (name == cu::name_of(d)) return d;
  }
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got '" + name + "'");
}

cu::Form form_of(const std::string& name) {
  for (const cu::Form f : {cu::Form::matrix, cu::Form::image, cu::Form::few, cu::Form::joined, cu::Form::plain}) {
    if (name == cu::name_of(f)) return f;
  }
  throw std::invalid_argument("form must be matrix, image, few, joined or plain, got '" + name + "'");
}

cu::Architecture architecture_of(const std::string& name) {
  for (const cu::Architecture a : {cu::Architecture::any, cu::Architecture::sm80, cu::Architecture::sm90}) {
    if (name == cu::name_of(a)) return a;
  }
  throw std::invalid_argument("architecture must be any, sm80 or sm90, got '" + name + "'");
}

fr::ConvShape shape(const Four& input, const Four& weight, const Four& output, const Two& stride, const Two& pad, const Two& dilation,
                    i64 groups, const Four& input_strides, const Four& output_strides, const std::optional<Four>& shortcut_strides,
                    bool has_bias, bool relu, const std::optional<JoinedTuple>& joined = std::nullopt) {
  fr::ConvShape s = fr::conv_shape(input, weight, output, stride, pad, dilation, input_strides, output_strides, shortcut_strides,
                                   has_bias, relu);
  s.groups = groups;
  if (joined) {
    const auto& [channels, steps, layout] = *joined;
    s.joined = {channels, steps[0], steps[1], strides(layout)};
  }
  return s;
}

// A device that need not be there: what a choice depends on, for the tests of the choice.
using Properties = std::tuple<int, int, int, double>;  // compute capability, multiprocessors, bandwidth
cu::Device described(int index, const std::optional<Properties>& properties) {
  if (!properties) return cu::device(index);
  cu::Device d;
  d.index = index;
  std::tie(d.major, d.minor, d.multiprocessors, d.bandwidth) = *properties;
  return d;
}

using cu::Planned;

}  // namespace

#if defined(FR_HOST_MODULE)
PYBIND11_MODULE(cuda_twin, m) {
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  m.doc() = "CUDA kernels of fused_resnet. Internal: the checks are in the Python files.";
  m.attr("INTERFACE") = kInterface;
  std::map<std::string, std::string> build{{"compiler", __VERSION__}};
  for (const auto& [name, value] : cu::build()) build[name] = value;
  m.attr("BUILD") = build;

  m.def("tiles", [] {
    std::vector<std::string> names;
    for (const auto& kernel : cu::tensor_kernels()) names.push_back(kernel.tile.name());
    return names;
  });
  m.def("load", &cu::load, py::arg("device"));
  m.def("kernels_to_load", &cu::kernels_to_load);
  m.def("capability", [](int index) { return std::pair(cu::device(index).major, cu::device(index).minor); }, py::arg("device"));
  m.def(
      "properties",
      [](int index) {
        const cu::Device& d = cu::device(index);
        return Properties(d.major, d.minor, d.multiprocessors, d.bandwidth);
      },
      py::arg("device"));

  // Types are the module's own: the tests load its twin beside it.
  py::class_<Planned, std::shared_ptr<Planned>>(m, "Convolution", py::module_local())
      .def(py::init([](const std::string& type, const Four& input, const Four& weight, const Four& output, const Two& stride,
                       const Two& pad, const Two& dilation, i64 groups, const Four& input_strides, const Four& weight_strides,
                       const Four& output_strides, const std::optional<Four>& shortcut_strides, bool has_bias, bool relu, int device,
                       bool tf32, const std::string& algorithm, const std::optional<Properties>& properties,
                       const std::optional<JoinedTuple>& joined, bool dependent) {
             const fr::ConvShape s = shape(input, weight, output, stride, pad, dilation, groups, input_strides, output_strides,
                                           shortcut_strides, has_bias, relu, joined);
             const auto planned = std::make_shared<Planned>(
                 Planned{cu::Convolution(s, dtype(type), described(device, properties), tf32, algorithm, dependent),
                         strides(weight_strides), device, s.joined.c});
             if (!properties) {
               const cu::CaptureIsUntouched relaxed;
               const cu::DeviceGuard guard(device);
               planned->convolution.prepare();
             }
             return planned;
           }),
           py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("stride"), py::arg("pad"),
           py::arg("dilation"), py::arg("groups"), py::arg("input_strides"), py::arg("weight_strides"), py::arg("output_strides"),
           py::arg("shortcut_strides"), py::arg("has_bias"), py::arg("relu"), py::arg("device"), py::arg("tf32"),
           py::arg("algorithm") = "auto", py::arg("properties") = py::none(), py::arg("joined") = py::none(),
           py::arg("dependent") = false)
      .def(
          "run",
          [](const Planned& p, Pointer x, Pointer weight, Pointer bias, Pointer shortcut, Pointer y, Pointer stream, Pointer joined,
             Pointer joined_weight) {
            const cu::DeviceGuard guard(p.device);
            // The joined weight is [K, joined channels] without gaps.
            p.convolution.run({in(x), in(weight), in(bias), in(shortcut), out(y), in(joined), in(joined_weight), {p.joined, 1, 1, 1}},
                              p.weight, out(stream));
          },
          py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("shortcut"), py::arg("output"), py::arg("stream"),
          py::arg("joined") = 0, py::arg("joined_weight") = 0,
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("tensor_cores", [](const Planned& p) { return p.convolution.tensor_cores(); })
      .def_property_readonly("algorithm", [](const Planned& p) { return p.convolution.name(); })
      .def_property_readonly("reason", [](const Planned& p) { return p.convolution.reason(); })
      .def_property_readonly("dependent", [](const Planned& p) { return p.convolution.dependent(); })
      .def_property_readonly("launches", [](const Planned& p) { return p.convolution.launches(); });

  using Places = std::tuple<std::shared_ptr<Planned>, std::optional<i64>, std::optional<i64>, std::optional<i64>, std::optional<i64>>;
  using Addresses = std::tuple<Pointer, Pointer, Pointer>;  // of a step's weight, bias and joined weight; 0: there is none
  py::class_<cu::Sequence>(m, "Sequence", py::module_local())
      .def(py::init([](const std::vector<Places>& places) {
             std::vector<cu::Sequence::Step> steps;
             for (const auto& [planned, x, shortcut, y, joined] : places) {
               constexpr i64 none = cu::Sequence::kNone;
               steps.push_back({planned, x.value_or(none), shortcut.value_or(none), y.value_or(none), joined.value_or(none)});
             }
             return cu::Sequence(std::move(steps));
           }),
           py::arg("steps"))
      .def(
          "run",
          [](const cu::Sequence& s, const std::vector<Pointer>& values, Pointer arena, const std::vector<Addresses>& weights, Pointer stream) {
            std::vector<const void*> given;
            for (const Pointer value : values) given.push_back(in(value));
            std::vector<cu::Sequence::Weights> kept;
            for (const auto& [weight, bias, joined] : weights) kept.push_back({in(weight), in(bias), in(joined)});
            py::gil_scoped_release release;
            s.run(given, out(arena), kept, out(stream));
          },
          py::arg("values"), py::arg("arena"), py::arg("weights"), py::arg("stream"));

  m.def(
      "choose",
      [](const std::string& type, const Four& input, const Four& weight, const Four& output, const Two& stride, const Two& pad,
         const Two& dilation, i64 groups, const Four& input_strides, const Four& output_strides,
         const std::optional<Four>& shortcut_strides, bool tf32, const Properties& properties,
         const std::vector<std::tuple<std::string, std::string, std::string, int, int>>& tiles, const std::string& algorithm,
         const std::optional<JoinedTuple>& joined) {
        const fr::ConvShape s = shape(input, weight, output, stride, pad, dilation, groups, input_strides, output_strides,
                                      shortcut_strides, true, true, joined);
        std::vector<cu::Tile> all;
        for (const auto& [architecture, name, form, rows, columns] : tiles) {
          all.push_back({architecture_of(architecture), dtype(name), form_of(form), rows, columns});
        }
        const cu::Choice c = cu::choose(s, dtype(type), described(0, properties), tf32, all, algorithm);
        return std::pair(c.tile < 0 ? std::string("general") : all[std::size_t(c.tile)].name(), c.reason);
      },
      py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("stride"), py::arg("pad"), py::arg("dilation"),
      py::arg("groups"), py::arg("input_strides"), py::arg("output_strides"), py::arg("shortcut_strides"), py::arg("tf32"),
      py::arg("properties"), py::arg("tiles"), py::arg("algorithm") = "auto", py::arg("joined") = py::none());

  m.def(
      "bias_add_relu",
      [](const std::string& type, const Four& size, const Four& y_strides, const Four& x_strides, const Four& shortcut_strides,
         bool relu, bool wide_input, Pointer x, Pointer bias, Pointer shortcut, Pointer y, int device, Pointer stream) {
        const auto s = fr::pass_shape(dtype(type), size, y_strides, x_strides, shortcut_strides, relu, wide_input);
        py::gil_scoped_release release;
        const cu::DeviceGuard guard(device);
        cu::bias_add_relu(s, in(x), in(bias), in(shortcut), out(y), out(stream));
      },
      py::arg("dtype"), py::arg("shape"), py::arg("output_strides"), py::arg("input_strides"), py::arg("shortcut_strides"),
      py::arg("relu"), py::arg("wide_input"), py::arg("input"), py::arg("bias"), py::arg("shortcut"), py::arg("output"),
      py::arg("device"), py::arg("stream"));
  m.def(
      "relu_backward_workspace",
      [](const std::string& type, const Four& size, const Four& result, const Four& grad, const Four& output) {
        return cu::relu_backward_workspace(fr::pass_shape(dtype(type), size, result, grad, output, true, false));
      },
      py::arg("dtype"), py::arg("shape"), py::arg("result_strides"), py::arg("grad_strides"), py::arg("output_strides"));
  m.def(
      "relu_backward",
      [](const std::string& type, const Four& size, const Four& result_strides, const Four& grad_strides, const Four& output_strides,
         Pointer grad, Pointer output, Pointer result, Pointer bias_grad, Pointer workspace, int device, Pointer stream) {
        const auto s = fr::pass_shape(dtype(type), size, result_strides, grad_strides, output_strides, true, false);
        py::gil_scoped_release release;
        const cu::DeviceGuard guard(device);
        cu::relu_backward(s, in(grad), in(output), out(result), out(bias_grad), out(workspace), out(stream));
      },
      py::arg("dtype"), py::arg("shape"), py::arg("result_strides"), py::arg("grad_strides"), py::arg("output_strides"),
      py::arg("grad"), py::arg("output"), py::arg("result"), py::arg("bias_grad"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"));
}
