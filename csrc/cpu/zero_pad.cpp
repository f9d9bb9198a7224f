#include "zero_pad.h"

#include <algorithm>
#include <stdexcept>

namespace fused_resnet {

ZeroPad::ZeroPad(const ZeroPadShape& s, i64 bytes) : shape_(s), bytes_(bytes) {
  if (s.n < 0 || s.c < 1 || s.p < 1 || s.q < 1 || s.stride_h < 1 || s.stride_w < 1 || s.before < 0 || s.k < s.before + s.c) {
    throw std::invalid_argument("a zero-padded shortcut needs sizes of at least 1, and the output all channels of the input");
  }
  checked_product(checked_product(s.n, s.k), checked_product(s.p, s.q));
}

i64 ZeroPad::tasks(int) const { return shape_.n * shape_.p; }

template <class Element>
void ZeroPad::row(const Element* x, Element* y) const {
  const ZeroPadShape& s = shape_;
  const i64 step = s.stride_w * s.x.w, behind = s.before + s.c;
  if (s.x.c == 1 && s.y.c == 1) {
    for (i64 q = 0; q < s.q; ++q, x += step, y += s.y.w) {
      std::fill(y, y + s.before, Element(0));
      std::copy(x, x + s.c, y + s.before);
      std::fill(y + behind, y + s.k, Element(0));
    }
    return;
  }
  for (i64 k = 0; k < s.k; ++k) {
    const bool there = k >= s.before && k < behind;
    for (i64 q = 0; q < s.q; ++q) y[k * s.y.c + q * s.y.w] = there ? x[(k - s.before) * s.x.c + q * step] : Element(0);
  }
}

bool ZeroPad::run_task(int, i64 index, const Operands& operands, char*, char*) const noexcept {
  const i64 n = index / shape_.p, p = index % shape_.p;
  const char* const x = static_cast<const char*>(operands.x) + (n * shape_.x.n + p * shape_.stride_h * shape_.x.h) * bytes_;
  char* const y = static_cast<char*>(operands.y) + (n * shape_.y.n + p * shape_.y.h) * bytes_;
  switch (bytes_) {
    case 2: row(reinterpret_cast<const std::uint16_t*>(x), reinterpret_cast<std::uint16_t*>(y)); break;
    case 4: row(reinterpret_cast<const std::uint32_t*>(x), reinterpret_cast<std::uint32_t*>(y)); break;
    default: row(reinterpret_cast<const std::uint64_t*>(x), reinterpret_cast<std::uint64_t*>(y));
  }
  return true;
}

std::string ZeroPad::describe() const { return "zero-padded shortcut of " + std::to_string(shape_.k) + " channels"; }

}  // namespace fused_resnet
