// The CUDA kernels' host build for Python, as csrc/bindings.cpp is for the CPU kernels: pointers and shapes come in as
// integers. Built by tests/cuda/_cuda_host.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "../../csrc/cuda/block.h"
#include "../../csrc/cuda/descriptor.h"
#include "../../csrc/cuda/general_launch.cuh"
#include "../../csrc/cuda/passes.cuh"
#include "../../csrc/python_shapes.h"

namespace py = pybind11;
namespace fr = fused_resnet;
namespace cuda = fused_resnet::cuda;
using fr::i64;
using fr::Four;
using fr::Pointer;
using fr::Two;
using fr::in;
using fr::out;
using fr::strides;

// In host.cpp.
#define FR_ELSEWHERE(T)                                                                                                    \
  extern template void cuda::general_convolution_of<T>(const cuda::GeneralPlan&, const fr::ConvShape&, const fr::Strides&, \
                                                       const cuda::ConvOperands&, cuda::Stream)
FR_ELSEWHERE(float);
FR_ELSEWHERE(double);
FR_ELSEWHERE(fr::bf16);
FR_ELSEWHERE(fr::fp16);

namespace {

fr::DType dtype(const std::string& name) {
  if (name == "float32") return fr::DType::float32;
  if (name == "float64") return fr::DType::float64;
  if (name == "bfloat16") return fr::DType::bfloat16;
  if (name == "float16") return fr::DType::float16;
  throw std::invalid_argument("unknown dtype " + name);
}

// (pointer, channels, stride, strides, weight's pointer, weight's strides)
using JoinedTuple = std::tuple<Pointer, i64, Two, Four, Pointer, Four>;

struct Call {
  fr::DType type = fr::DType::float32;
  fr::ConvShape shape;
  fr::Strides weight;
  cuda::ConvOperands operands;
  i64 bytes() const { return type == fr::DType::float64 ? 8 : type == fr::DType::float32 ? 4 : 2; }
};

Call make_call(const std::string& type, const Four& input, const Four& weight, const Four& output, const Two& stride,
               const Two& pad, const Two& dilation, i64 groups, const Four& input_strides, const Four& weight_strides,
               const Four& output_strides, const std::optional<Four>& shortcut_strides, bool relu, Pointer x, Pointer w,
               Pointer bias, Pointer shortcut, Pointer y, const std::optional<JoinedTuple>& joined) {
  Call call;
  call.type = dtype(type);
  fr::ConvShape& s = call.shape;
  s = fr::conv_shape(input, weight, output, stride, pad, dilation, input_strides, output_strides, shortcut_strides, bias != 0, relu);
  s.groups = groups;
  call.weight = strides(weight_strides);
  call.operands.x = in(x);
  call.operands.weight = in(w);
  call.operands.bias = in(bias);
  call.operands.shortcut = in(shortcut);
  call.operands.y = out(y);
  if (joined) {
    const auto& [data, channels, steps, data_strides, joined_weight, joined_weight_strides] = *joined;
    s.joined = {channels, steps[0], steps[1], strides(data_strides)};
    call.operands.joined = in(data);
    call.operands.joined_weight = in(joined_weight);
    call.operands.joined_weight_strides = strides(joined_weight_strides);
  }
  return call;
}

cuda::GeneralTile tile_of(const std::string& name) {
  if (name == "large") return cuda::GeneralTile::large;
  if (name == "medium") return cuda::GeneralTile::medium;
  if (name == "narrow") return cuda::GeneralTile::narrow;
  throw std::invalid_argument("unknown tile " + name);
}

// `tile` "auto": as the library calls it. Else that tile, with 64-bit offsets where `wide` (medium tiles have none: large).
void run(const Call& c, const std::string& tile, bool wide) {
  if (tile == "auto" && !wide) return cuda::general_convolution(c.type, c.shape, c.weight, c.operands, nullptr);
  if (c.shape.empty()) return;
  cuda::GeneralPlan plan = cuda::general_plan(c.shape, c.weight, c.operands, c.bytes());
  if (tile != "auto") plan.tile = tile_of(tile);
  plan.wide = plan.wide || wide;
  switch (c.type) {
    case fr::DType::float32: return cuda::general_convolution_of<float>(plan, c.shape, c.weight, c.operands, nullptr);
    case fr::DType::float64: return cuda::general_convolution_of<double>(plan, c.shape, c.weight, c.operands, nullptr);
    case fr::DType::bfloat16: return cuda::general_convolution_of<fr::bf16>(plan, c.shape, c.weight, c.operands, nullptr);
    case fr::DType::float16: return cuda::general_convolution_of<fr::fp16>(plan, c.shape, c.weight, c.operands, nullptr);
  }
}

std::tuple<std::string, bool, bool> plan(const Call& c) {
  const cuda::GeneralPlan p = cuda::general_plan(c.shape, c.weight, c.operands, c.bytes());
  const char* const names[] = {"large", "medium", "narrow"};
  return {names[int(p.tile)], p.wide, p.vector_store};
}

// Where output pixel `number` and term `term` are: (h, w, offset in x, offset in y) and (h, w, offset in x, in weight).
std::tuple<Four, Four> locate(const Call& c, i64 number, i64 term) {
  const cuda::GeneralPlan p = cuda::general_plan(c.shape, c.weight, c.operands, c.bytes());
  const auto kernel = cuda::general_kernel<float, i64, cuda::NarrowTile>(p, c.shape, c.weight, c.operands);
  using Kernel = cuda::GeneralConvolution<float, i64, cuda::NarrowTile>;
  Kernel::Pixel pixel;
  Kernel::PixelEnd end;
  kernel.locate(number, 0, pixel, end);
  const Kernel::Term t = kernel.term_at(term);
  return {Four{pixel.h, pixel.w, pixel.x, end.y}, Four{t.h, t.w, t.x, t.weight}};
}

fr::PassShape pass_shape(const std::string& type, const Four& shape, const Four& result, const Four& first, const Four& second,
                         bool relu, bool wide_input) {
  return fr::pass_shape(dtype(type), shape, result, first, second, relu, wide_input);
}

}  // namespace

PYBIND11_MODULE(cuda_host, m) {
  m.doc() = "The CUDA kernels of fused_resnet, run on the host. For tests.";
  // order: 0 forward, 1 reverse, 2 shuffled. poison: a byte, or -1 for none.
  m.def("refused_descriptor", [](const std::string& what, const std::string& why, int type, Pointer address,
                                 const std::vector<std::uint64_t>& sizes, const std::vector<std::uint64_t>& strides,
                                 const std::string& box, const std::string& corners, const std::vector<std::uint32_t>& steps) {
    return cuda::refused_descriptor(what.c_str(), why, type, unsigned(sizes.size()), in(address), sizes.data(), strides.data(), box,
                                    corners, steps.data());
  });
  m.def("set_options", [](int order, int poison) {
    cuda::host_options.order = cuda::HostOptions::Order(order);
    cuda::host_options.poison = poison;
  });
  py::class_<Call>(m, "Convolution")
      .def(py::init(&make_call), py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("stride"),
           py::arg("pad"), py::arg("dilation"), py::arg("groups"), py::arg("input_strides"), py::arg("weight_strides"),
           py::arg("output_strides"), py::arg("shortcut_strides"), py::arg("relu"), py::arg("input_data"),
           py::arg("weight_data"), py::arg("bias_data"), py::arg("shortcut_data"), py::arg("output_data"), py::arg("joined"))
      .def("run", &run, py::arg("tile") = "auto", py::arg("wide") = false)
      .def("plan", &plan)
      .def("locate", &locate, py::arg("pixel"), py::arg("term"));
  py::class_<fr::PassShape>(m, "PassShape")
      .def(py::init(&pass_shape), py::arg("dtype"), py::arg("shape"), py::arg("result"), py::arg("first"), py::arg("second"),
           py::arg("relu") = true, py::arg("wide_input") = false)
      .def("pieces", [](const fr::PassShape& s) {
        const cuda::Pieces pieces = cuda::pieces_of(s);
        return std::make_tuple(pieces.count, pieces.length);
      })
      // Image, channel, row and column of an element in the result's order.
      .def("position", [](const fr::PassShape& s, i64 element) {
        const auto at = cuda::extent_of(s).at(element);
        return Four{at.n, at.k, at.p, at.q};
      });
  m.def("bias_add_relu", [](const fr::PassShape& s, Pointer input, Pointer bias, Pointer shortcut, Pointer result) {
    cuda::bias_add_relu(s, in(input), in(bias), in(shortcut), out(result), nullptr);
  });
  m.def("relu_backward", [](const fr::PassShape& s, Pointer grad, Pointer output, Pointer result, Pointer bias_grad,
                            Pointer workspace) {
    cuda::relu_backward(s, in(grad), in(output), out(result), out(bias_grad), out(workspace), nullptr);
  });
  m.def("relu_backward_workspace", &cuda::relu_backward_workspace);
}
