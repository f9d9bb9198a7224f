#include "check.h"

#include <cstdarg>
#include <cstdio>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace memory {
namespace {

unsigned step = 1, seed = 1, number = 0;
int failures = 0, checks = 0;
char context[512] = "";

unsigned hash(unsigned value) {
  value = (value ^ (value >> 16)) * 0x45d9f3bu;
  value = (value ^ (value >> 16)) * 0x45d9f3bu;
  return value ^ (value >> 16);
}

}  // namespace

void start(unsigned every, unsigned with_seed) {
  step = every, seed = with_seed;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what failed before a crash is printed
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  // A sanitizer's report does not know the case.
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "in the case: %s; case %u, seed %u\n", context, number, seed); });
#endif
}

bool all_cases() { return step == 1; }

bool take(bool always) { return hash(++number) % step == 0 || always; }

void describe(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(context, sizeof context, format, arguments);
  va_end(arguments);
}

void expect(bool ok, const char* what) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s: %s; case %u, seed %u\n", what, context, number, seed);
}

unsigned case_seed() { return hash(seed * 0x9e3779b9u + number); }

int finish() {
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}

const char* name(fused_resnet::DType dtype) {
  switch (dtype) {
    case fused_resnet::DType::float32: return "float32";
    case fused_resnet::DType::float64: return "float64";
    default: return "bfloat16";
  }
}

}  // namespace memory
