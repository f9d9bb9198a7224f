// What training alone needs of the compiled module: convolutions with a weight that is used once, and gradients.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "cpu/input_gradient.h"
#include "cpu/max_pool.h"
#include "cpu/weight_gradient.h"
#include "python_shapes.h"
#include "words.h"

namespace py = pybind11;
namespace fr = fused_resnet;
using fr::Four;
using fr::Pointer;
using fr::Two;
using fr::dtype;
using fr::in;
using fr::out;
using fr::request;
using fr::strides;

namespace {

// A gradient of a convolution, but for its way to run. end_strides: of what is added to it or, masked, of the ReLU's output it goes through.
template <class Gradient>
py::class_<Gradient> gradient_class(py::module_& m, const char* name) {
  py::class_<Gradient> type(m, name);
  type.def(py::init([](const std::string& type, const Four& input, const Four& weight, const Four& output, const Two& stride,
                       const Two& pad, const Two& dilation, const Four& input_strides, const Four& weight_strides,
                       const Four& output_strides, const std::optional<Four>& end_strides, bool masked, int threads,
                       const std::string& algorithm, bool strict) {
             fr::ConvShape s = fr::conv_shape(input, weight, output, stride, pad, dilation, input_strides, output_strides,
                                              end_strides, false, false);
             s.masked = masked;
             return std::make_unique<Gradient>(s, strides(weight_strides), dtype(type), threads, request(algorithm, strict));
           }),
           py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("stride"), py::arg("pad"),
           py::arg("dilation"), py::arg("input_strides"), py::arg("weight_strides"), py::arg("output_strides"),
           py::arg("end_strides") = std::nullopt, py::arg("masked") = false, py::arg("threads"), py::arg("algorithm") = "auto",
           py::arg("strict") = false)
      .def_property_readonly("workspace_bytes", &Gradient::workspace_bytes)
      .def_property_readonly("isa", &Gradient::isa)
      .def_property_readonly("algorithm", [](const Gradient& g) { return fr::word(g.algorithm()); })
      .def("describe", &Gradient::describe)
      .def_property_readonly("reason", &Gradient::reason);
  return type;
}

}  // namespace

void bind_training(py::module_& m) {
  py::class_<fr::FreshConvolution>(m, "FreshConvolution")
      .def(py::init([](const std::string& type, const Four& input, const Four& weight, const Four& output, const Two& stride,
                       const Two& pad, const Two& dilation, const Four& input_strides, const Four& weight_strides,
                       const Four& output_strides, const std::optional<Four>& shortcut_strides, bool has_bias, bool relu, int threads,
                       const std::string& algorithm, bool strict) {
             const fr::ConvShape s = fr::conv_shape(input, weight, output, stride, pad, dilation, input_strides, output_strides,
                                                    shortcut_strides, has_bias, relu);
             return std::make_unique<fr::FreshConvolution>(s, strides(weight_strides), dtype(type), threads, request(algorithm, strict),
                                                           false);
           }),
           py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("stride"), py::arg("pad"),
           py::arg("dilation"), py::arg("input_strides"), py::arg("weight_strides"), py::arg("output_strides"),
           py::arg("shortcut_strides"), py::arg("has_bias"), py::arg("relu"), py::arg("threads"), py::arg("algorithm") = "auto",
           py::arg("strict") = false)
      .def(
          "run",
          [](const fr::FreshConvolution& c, Pointer x, Pointer weight, Pointer bias, Pointer shortcut, Pointer y) {
            return c.run({in(x), in(weight), in(bias), in(shortcut), out(y), nullptr, {}});
          },
          py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("shortcut"), py::arg("output"),
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("workspace_bytes", &fr::FreshConvolution::workspace_bytes)
      .def("describe", &fr::FreshConvolution::describe);

  py::class_<fr::MaxPoolGradient>(m, "MaxPoolGradient")
      .def(py::init([](const std::string& type, const Four& input, const Four& output, const Two& kernel, const Two& stride, const Two& pad,
                       const Four& input_strides, const Four& grad_strides, bool masked, int threads) {
             return std::make_unique<fr::MaxPoolGradient>(fr::pool_shape(input, output, kernel, stride, pad, input_strides, grad_strides, true),
                                                          dtype(type), masked, threads);
           }),
           py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("kernel"), py::arg("stride"), py::arg("pad"),
           py::arg("input_strides"), py::arg("grad_strides"), py::arg("masked"), py::arg("threads"))
      .def(
          "run",
          [](const fr::MaxPoolGradient& g, Pointer grad, Pointer input, Pointer grad_input) {
            g.run({in(grad), in(input), nullptr, nullptr, out(grad_input), nullptr, {}});
          },
          py::arg("grad"), py::arg("input"), py::arg("grad_input"), py::call_guard<py::gil_scoped_release>());

  gradient_class<fr::InputGradient>(m, "InputGradient")
      .def(
          "run",
          [](const fr::InputGradient& g, Pointer grad, Pointer weight, Pointer end, Pointer grad_input) {
            return g.run({in(grad), in(weight), nullptr, in(end), out(grad_input), nullptr, {}});
          },
          py::arg("grad"), py::arg("weight"), py::arg("end"), py::arg("grad_input"), py::call_guard<py::gil_scoped_release>());
  gradient_class<fr::WeightGradient>(m, "WeightGradient")
      .def(
          "run",
          [](const fr::WeightGradient& g, Pointer grad, Pointer input, Pointer grad_weight) {
            return g.run({in(input), in(grad), nullptr, nullptr, out(grad_weight), nullptr, {}});
          },
          py::arg("grad"), py::arg("input"), py::arg("grad_weight"), py::call_guard<py::gil_scoped_release>());
}
