#include "fingerprint.h"

#include <algorithm>
#include <cstring>

#include "../prefetch.h"

namespace fused_resnet {
namespace {

constexpr i64 kWord = sizeof(std::uint64_t), kSamples = 64, kLine = 64;

// Where the sample with this number begins: evenly spread, the first and the last word included.
i64 sample_at(i64 bytes, i64 i) { return (bytes / kWord - 1) * i / (kSamples - 1) * kWord; }

}  // namespace

std::uint64_t fingerprint(const void* data, i64 bytes, i64 most) {
  using Word = std::uint64_t;
  constexpr i64 kLanes = 8;
  const char* p = static_cast<const char*>(data);
  Word lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
  // Multiplying by an odd number and folding the high bits down are both invertible: one changed word changes its lane.
  const auto mix = [&](i64 lane, Word word) {
    lanes[lane] = word * 0x9e3779b97f4a7c15u;
    lanes[lane] ^= lanes[lane] >> 29;
  };
  const auto read = [](const char* from) {
    Word word;
    std::memcpy(&word, from, sizeof word);
    return word;
  };
  if (bytes > most) {
    for (i64 i = 0; i < kSamples; ++i) mix(i % kLanes, lanes[i % kLanes] ^ read(p + sample_at(bytes, i)));
  } else {
    i64 i = 0;
    // Two words for each multiplication, of which there is one a cycle; the second turned, so that equal changes of both do not cancel.
    for (; i + 2 * kLanes * kWord <= bytes; i += 2 * kLanes * kWord) {
#pragma GCC unroll 8
      for (i64 lane = 0; lane < kLanes; ++lane) {
        const char* const pair = p + i + 2 * lane * kWord;
        const Word second = read(pair + kWord);
        mix(lane, (lanes[lane] ^ read(pair)) + (second << 29 | second >> 35));
      }
    }
    for (; i + kWord <= bytes; i += kWord) mix(0, lanes[0] ^ read(p + i));
    Word rest = 0;
    std::memcpy(&rest, p + i, std::size_t(bytes - i));
    mix(1, lanes[1] ^ rest);
  }
  Word result = Word(bytes);
  for (const Word lane : lanes) result = (result ^ lane) * 0xff51afd7ed558ccdu;
  return result ^ (result >> 32);
}

void Guard::Memory::prefetch() const {
  const char* const p = static_cast<const char*>(data);
  if (bytes > most) {
    for (i64 i = 0; i < kSamples; ++i) fused_resnet::prefetch(p + sample_at(bytes, i));
  } else {
    // The core itself sees where a longer reading goes on.
    for (i64 i = 0; i < std::min(bytes, 32 * kLine); i += kLine) fused_resnet::prefetch(p + i);
  }
}

bool Guard::holds(i64 i) const {
  if (i + 1 < size()) memory_[std::size_t(i + 1)].prefetch();
  const Memory& m = memory_[std::size_t(i)];
  return fingerprint(m.data, m.bytes, m.most) == m.expected;
}

bool Guard::holds() const {
  for (i64 i = 0; i < size(); ++i) {
    if (!holds(i)) return false;
  }
  return true;
}

i64 Guard::bytes_read() const {
  i64 bytes = 0;
  for (const Memory& m : memory_) bytes += m.bytes > m.most ? kSamples * kLine : m.bytes;
  return bytes;
}

}  // namespace fused_resnet
