#include "config.h"

#include <algorithm>
#include <stdexcept>

namespace fused_resnet::cuda {
namespace {

constexpr i64 kLargestIndex = (i64(1) << 31) - 1;

// Channels_last without gaps. The stride of an axis of size 1 says nothing.
bool is_dense(const Strides& s, i64 n, i64 c, i64 h, i64 w) {
  return (c == 1 || s.c == 1) && (w == 1 || s.w == c) && (h == 1 || s.h == w * c) && (n == 1 || s.n == h * w * c);
}

bool is_matrix(const ConvShape& s) {
  return s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_top == 0 && s.pad_left == 0 && s.p == s.h && s.q == s.w;
}

bool is_few(const ConvShape& s, DType dtype) { return s.c == kFew && bytes_of(dtype) == 2 && s.joined.c == 0; }

std::string number(i64 value) { return std::to_string(value); }

// What TMA's im2col mode cannot express.
std::string why_not_image(const ConvShape& s) {
  if (std::max(s.joined.stride_h, s.joined.stride_w) > 8) return "a projection's stride above 8: TMA takes at most 8";
  if (is_matrix(s)) return "";
  const i64 bottom = std::max<i64>(0, (s.p - 1) * s.stride_h + (s.r - 1) * s.dilation_h + 1 - s.pad_top - s.h);
  const i64 right = std::max<i64>(0, (s.q - 1) * s.stride_w + (s.s - 1) * s.dilation_w + 1 - s.pad_left - s.w);
  const i64 reach_h = (s.r - 1) * s.dilation_h, reach_w = (s.s - 1) * s.dilation_w;
  if (std::max(s.stride_h, s.stride_w) > 8) return "stride " + number(std::max(s.stride_h, s.stride_w)) + ": TMA takes at most 8";
  if (std::max(s.pad_top, s.pad_left) > 127 || std::max(bottom - reach_h, right - reach_w) > 127 ||
      std::min(bottom - reach_h, right - reach_w) < -128 || std::max(reach_h, reach_w) >= 255) {
    return "a kernel or a padding that reaches further than TMA's offsets of 8 bits";
  }
  return "";
}

}  // namespace

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return "float64";
    case DType::float32: return "float32";
    case DType::bfloat16: return "bfloat16";
    default: return "float16";
  }
}

const char* name_of(Architecture architecture) {
  switch (architecture) {
    case Architecture::sm90: return "sm90";
    case Architecture::sm80: return "sm80";
    default: return "any";
  }
}

const char* name_of(Form form) {
  switch (form) {
    case Form::matrix: return "matrix";
    case Form::image: return "image";
    case Form::few: return "few";
    case Form::plain: return "plain";
    default: return "joined";
  }
}

std::string Tile::name() const {
  return std::string(name_of(architecture)) + " " + name_of(dtype) + " " + name_of(form) + " " + std::to_string(m) + "x" + std::to_string(n);
}

std::string why_not_tensor_cores(const ConvShape& s, DType dtype, const Device& device, bool tf32) {
  const i64 vector = 16 / bytes_of(dtype);
  if (device.capability() < 80) return "compute capability " + number(device.major) + "." + number(device.minor) + ": our tensor-core kernels need 8.0";
  if (dtype == DType::float64) return "float64 has no tensor-core kernel";
  if (dtype == DType::float32 && !tf32) return "float32 without TF32 (torch.backends.cudnn.allow_tf32) has no tensor-core kernel";
  if (s.groups != 1) return "groups = " + number(s.groups) + ": our tensor-core kernels are for groups = 1";
  const Strides j = joined_strides(s);
  if (s.joined.c && (j.n <= 0 || j.h <= 0 || j.w <= 0)) return "the projection's input is expanded";
  if (s.joined.c % vector || (s.joined.c && (j.c != 1 || j.n % vector || j.h % vector || j.w % vector))) {
    return "the projection's input is not channels_last with multiples of " + number(vector) + " channels";
  }
  if ((s.c % vector && !is_few(s, dtype)) || s.k % vector) {
    return number(s.c) + " input and " + number(s.k) + " output channels: " + name_of(dtype) + " tensor-core kernels need multiples of " + number(vector);
  }
  if (!is_dense(s.x, s.n, s.c, s.h, s.w) || !is_dense(s.y, s.n, s.k, s.p, s.q)) return "input is not channels_last without gaps";
  if (s.has_shortcut && !is_dense(s.shortcut, s.n, s.k, s.p, s.q)) return "shortcut is not channels_last without gaps";
  if (std::max(s.r, s.s) > 32) return "a kernel of " + number(s.r) + "x" + number(s.s) + ": our tensor-core kernels go up to 32";
  // One image at a time must be addressable; more images than that are cut into several launches.
  const i64 largest = std::max({s.h * s.w * s.c, s.p * s.q * s.k, s.k * s.r * s.s * s.c}) * bytes_of(dtype);
  if (largest > kLargestIndex) return "an image or a weight of more than 2^31 bytes";
  return device.major == 9 && !is_few(s, dtype) ? why_not_image(s) : "";
}

Strides joined_strides(const ConvShape& s) {
  const Joined& j = s.joined;
  Strides t = j.x;
  if (s.q == 1) t.w = j.c;
  if (s.p == 1) t.h = ((s.q - 1) * j.stride_w + 1) * t.w;
  if (s.n == 1) t.n = ((s.p - 1) * j.stride_h + 1) * t.h;
  return t;
}

i64 images_a_launch(const ConvShape& s, const Tile& tile) {
  const i64 image = std::max(s.h * s.w * s.c, s.p * s.q * s.k) * bytes_of(tile.dtype);
  i64 images = kLargestIndex / image;
  // CUTLASS's iterator over a few channels forms 16 times the element's offset in 32 bits.
  if (tile.form == Form::few) images = std::min(images, (kLargestIndex / 16) / (s.h * s.w * s.c));
  return std::min(images, s.n);
}

Choice choose(const ConvShape& s, DType dtype, const Device& device, bool tf32, const std::vector<Tile>& tiles, const std::string& wanted) {
  Choice choice;
  if (wanted == "general") {
    choice.reason = "asked for";
    return choice;
  }
  const std::string why = why_not_tensor_cores(s, dtype, device, tf32);
  const Architecture architecture = device.major == 9 ? Architecture::sm90 : Architecture::sm80;
  const auto suits = [&](const Tile& t) {
    if (t.dtype != dtype) return false;
    if ((t.form == Form::joined) != (s.joined.c > 0)) return false;
    if (t.form == Form::few) return is_few(s, dtype) && (s.n == 0 || images_a_launch(s, t) > 0);
    return t.architecture == architecture && !is_few(s, dtype) && (t.form != Form::matrix || is_matrix(s));
  };
  if (wanted != "auto") {
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      if (tiles[i].name() != wanted) continue;
      if (!why.empty()) throw std::invalid_argument("algorithm '" + wanted + "' cannot compute this: " + why);
      if (!suits(tiles[i])) throw std::invalid_argument("algorithm '" + wanted + "' is not for this dtype, shape or device");
      choice.tile = int(i);
      choice.reason = "asked for";
      return choice;
    }
    throw std::invalid_argument("algorithm must be auto, general or the name of a tile of this build, got '" + wanted + "'");
  }
  choice.reason = why;
  if (!why.empty()) return choice;
  // A matrix's own form before the im2col form of the same tile: equal predictions keep the first.
  double best = 0;
  for (const Form form : {Form::matrix, Form::image, Form::few, Form::joined}) {
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      if (!suits(tiles[i]) || tiles[i].form != form) continue;
      const double time = predicted_time(s, tiles[i], device);
      if (choice.tile < 0 || time < best) {
        choice.tile = int(i);
        best = time;
      }
    }
  }
  choice.reason = choice.tile < 0 ? std::string("this build has no ") + name_of(architecture) + (s.joined.c ? " kernels with a projection for " : " kernels for ") + name_of(dtype)
                                  : tiles[std::size_t(choice.tile)].name() + ": predicted " + std::to_string(int(best + 0.5)) + " us";
  return choice;
}

}  // namespace fused_resnet::cuda
