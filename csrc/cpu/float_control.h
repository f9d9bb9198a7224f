// What a thread's instructions do with denormals and how they round.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <cfenv>
#endif

namespace fused_resnet {

// The settings of one thread (torch.set_flush_denormal changes the calling thread's). Whoever helps it takes them over: no result depends
// on who computed it.
class FloatControl {
 public:
#if defined(__x86_64__)
  static FloatControl now() {
    FloatControl control;
    control.state_ = _mm_getcsr();
    return control;
  }
  void set() const { _mm_setcsr(state_); }
#else
  static FloatControl now() {
    FloatControl control;
    std::fegetenv(&control.state_);
    return control;
  }
  void set() const { std::fesetenv(&state_); }
#endif

 private:
  FloatControl() = default;
#if defined(__x86_64__)
  unsigned state_ = 0;
#else
  std::fenv_t state_ = {};
#endif
};

// While it lives, its thread has the settings `control`, afterwards its own again.
class FloatControlScope {
 public:
  explicit FloatControlScope(const FloatControl& control) : before_(FloatControl::now()) { control.set(); }
  ~FloatControlScope() { before_.set(); }
  FloatControlScope(const FloatControlScope&) = delete;
  FloatControlScope& operator=(const FloatControlScope&) = delete;

 private:
  FloatControl before_;
};

}  // namespace fused_resnet
