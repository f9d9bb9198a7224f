// Whole residual blocks, each a program of one section.
#include <memory>
#include <set>
#include <string>

#include "block_problem.h"
#include "by_hand.h"
#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "reference.h"

using namespace fused_resnet;

namespace memory {
namespace {

// What the cases hit: an instruction set's name and what else expect_hits() puts together.
std::set<std::string> hits;

struct Variant {
  int x, y, external, weight, threads;  // external: a layout, or kLayouts: one value for each channel
};

// How the images are dealt out.
std::string schedule(const Program& block, const BlockShape& shape) {
  const std::string text = block.describe();
  if (text.rfind("depth first, ", 0) != 0) return "layer by layer, ";
  const i64 images = std::stol(text.substr(13));
  return std::string("depth first, ") + (shape.n % images ? "a last group of fewer images, " : "equal groups, ");
}

void run_case(const BlockProblem& g, Kind kind, DType dtype, const Request& wanted, const char* algorithm, const Variant& v) {
  BlockShape s = g.shape;
  const Layer& last = s.main.back();
  Tensor x(dtype, s.n, s.c, s.h, s.w, layout(v.x, s.c, s.h, s.w));
  Tensor y(dtype, s.n, last.k, last.p, last.q, layout(v.y, last.k, last.p, last.q));
  Tensor by_run(dtype, s.n, last.k, last.p, last.q, y.strides());
  Tensor external(dtype, s.n, last.k, last.p, last.q,
                  v.external == kLayouts ? Strides{0, 1, 0, 0} : layout(v.external, last.k, last.p, last.q));
  BlockProblem problem = g;
  for (std::size_t i = 0; v.external == kLayouts && i < g.external.size(); ++i) {
    problem.external[i] = i / std::size_t(last.p * last.q) % std::size_t(last.k) % 3;
  }
  x.set(g.x), external.set(problem.external);
  s.x = x.strides(), s.y = y.strides(), s.shortcut = external.strides();

  const Program block(network_of(s), s.y, dtype, v.threads, wanted);
  const bool joins = is_joined(s, block);
  expect(joins == (kind == Kind::joined), "the projection is joined where it can be");
  const std::string hit = std::string(current_table().isa) + ", " + schedule(block, s);
  hits.insert(hit + (block.threads() > 1 ? "several threads, " : "one thread, ") + name(kind));

  // Packed weights and biases; a joined projection's are in the last layer's.
  std::vector<std::unique_ptr<Tensor>> biases;
  std::vector<std::unique_ptr<Guarded>> packed;
  const void* const inputs[] = {x.data(), external.data()};
  std::vector<const void*> packed_weights, bias;
  const std::size_t first = s.number(0), last_number = s.convolutions() - 1;
  const auto layer_of = [&](std::size_t i) -> const Layer& { return i < first ? s.projection : s.main[i - first]; };
  const auto weight_of = [&](std::size_t i) {
    const Layer& l = layer_of(i);
    const i64 c = i <= first ? s.c : s.main[i - first - 1].k;
    auto made = std::make_unique<Tensor>(dtype, l.k, c, l.r, l.s, layout(v.weight, c, l.r, l.s));
    made->set(g.weight[i]);
    return made;
  };
  for (std::size_t i = 0; i < block.convolutions(); ++i) {
    if (block.convolution(i) == nullptr) {
      expect(joins && i == 0, "a convolution without a kernel is a joined projection");
      packed_weights.push_back(nullptr);
      bias.push_back(nullptr);
      continue;
    }
    const Convolution& convolution = *block.convolution(i);
    hits.insert(std::string(current_table().isa) + ", " + algorithm + " " + std::to_string(int(convolution.choice().algorithm)));
    if (convolution.phases() > 1) {
      const bool depth_first = hit.find("depth first") != std::string::npos;
      hits.insert(std::string(current_table().isa) + ", two phases, " + (depth_first ? "depth first" : "layer by layer"));
    }
    const bool with_projection = joins && i == last_number;
    const auto weight = weight_of(i), joined = weight_of(with_projection ? 0 : i);
    packed.push_back(std::make_unique<Guarded>(convolution.packed_bytes()));
    packed.back()->fill(0xff);
    const WeightView joined_view{joined->data(), joined->strides()};
    const WeightView view{weight->data(), weight->strides()};
    expect(convolution.pack(view, with_projection ? joined_view : WeightView{}, packed.back()->get()), "the transformed weight is finite");
    expect(weight->intact() && joined->intact(), "guard bytes of the weight after packing");
    Values sum = g.bias[i];
    for (std::size_t k = 0; with_projection && k < sum.size(); ++k) sum[k] += g.bias.front()[k];
    const Layer& l = layer_of(i);
    const bool has_bias = l.has_bias || (with_projection && s.projection.has_bias);
    biases.push_back(std::make_unique<Tensor>(dtype, l.k, 1, 1, 1, Strides{1, 0, 0, 0}));
    if (has_bias) biases.back()->set(sum);
    packed_weights.push_back(packed.back()->get());
    bias.push_back(has_bias ? biases.back()->data() : nullptr);
  }
  ProgramOperands operands{inputs, packed_weights.data(), bias.data(), nullptr};
  const auto intact = [&] {
    bool ok = x.intact() && external.intact() && y.intact() && by_run.intact();
    for (const auto& p : packed) ok = ok && p->intact();
    for (const auto& b : biases) ok = ok && b->intact();
    return ok;
  };
  expect(intact(), "guard bytes after packing");
  operands.y = by_run.data();
  expect(run_afresh(block, operands), "finite");
  expect(intact(), "guard bytes");
  operands.y = y.data();
  expect(by_hand(block, operands), "guard bytes of the workspaces, and finite");
  expect(intact(), "guard bytes after the tasks by hand");
  expect(y.gaps_are_nan(), "nothing is written between the elements");
  expect(y.same_bits(by_run), "the same bits in any order of tasks");

  const Expected want = expected(problem, block, dtype);
  const Values ours = y.values();
  bool good = ours.size() == want.y.size();
  for (std::size_t i = 0; good && i < ours.size(); ++i) {
    good = want.bound == 0 ? ours[i] == want.y[i] : std::fabs(ours[i] - want.y[i]) <= want.bound;
  }
  expect(good, "block");
}

constexpr Geometry kGeometries[] = {
    // Layer by layer, several tasks a layer.
    {1, 8, 27, 20, 9, 12, false, 1, 1},
    {1, 8, 27, 20, 9, 12, true, 2, 1},
    {1, 3, 5, 7, 5, 4, false, 1, 1},
    {1, 9, 6, 5, 17, 33, true, 1, 1},
    {0, 5, 6, 6, 7, 5, true, 1, 1},
    {0, 5, 6, 6, 7, 5, false, 1, 1},
    {2, 17, 7, 6, 17, 20, false, 2, 1},
    // Depth first in one thread: groups of 3 images, and a last one of 2.
    {5, 16, 7, 7, 16, 16, false, 1, 1},
    {5, 6, 14, 13, 18, 33, true, 2, 1},
    {3, 33, 9, 4, 20, 16, false, 1, 2},
    // So many channels that the intermediate's pixels lie further apart than they are long.
    {3, 6, 3, 2, 256, 40, true, 1, 1},
};
// Several threads on every instruction set.
constexpr Geometry kLarge[] = {
    {1, 64, 16, 16, 96, 64, false, 1, 1},
    {1, 64, 16, 16, 96, 64, true, 1, 1},
    // Depth first with 2 or 3 threads: 6 groups, of which the last has fewer images. Layer by layer with 7.
    {23, 32, 7, 7, 48, 32, false, 1, 1},
    {23, 32, 7, 7, 48, 32, true, 1, 1},
};

struct Wish {
  const char* name;
  Request request;
};

const Wish kWishes[] = {{"auto", {}},
                        {"auto, strict", {true, Algorithm::direct, true}},
                        {"direct", request(Algorithm::direct)},
                        {"winograd2", request(Algorithm::winograd2)},
                        {"winograd4", request(Algorithm::winograd4)}};
constexpr int kThreads[] = {1, 2, 3, 7};

void expect_hits() {
  for (const KernelTable* table : available_tables()) {
    for (const Kind kind : kKinds) {
      for (const char* how : {"layer by layer, one thread", "layer by layer, several threads", "depth first, equal groups, one thread",
                              "depth first, a last group of fewer images, one thread",
                              "depth first, a last group of fewer images, several threads"}) {
        describe("%s, %s, %s", table->isa, how, name(kind));
        expect(hits.count(std::string(table->isa) + ", " + how + ", " + name(kind)) > 0, "this way to run a block was hit");
      }
    }
    // The numbers are those of Algorithm.
    for (const char* what : {"auto 0", "auto, strict 0", "direct 0", "winograd2 1", "winograd4 2", "two phases, depth first",
                             "two phases, layer by layer"}) {
      describe("%s, %s", table->isa, what);
      expect(hits.count(std::string(table->isa) + ", " + what) > 0, "this algorithm was hit");
    }
  }
}

}  // namespace

void blocks() {
  int number = 0;  // of the problem
  const auto run = [&](const BlockProblem& g, const Geometry& sizes, Kind kind, const KernelTable* table, DType dtype,
                       const Wish& wish, int threads, bool always = false) {
    if (!take(always)) return;
    set_isa(table->isa);
    std::mt19937 choose(case_seed());
    const auto pick = [&](int most) { return int(choose() % unsigned(most)); };
    const Variant v{pick(kLayouts), pick(kLayouts), pick(kLayouts + 1), pick(kLayouts), threads};
    describe("block %d, %s %s %s: n=%ld c=%ld %ldx%ld k=%ld out=%ld %s stride=%ld, %s, layouts=%d,%d,%d,%d threads=%d", number, table->isa,
             name(dtype), wish.name, long(sizes.n), long(sizes.c), long(sizes.h), long(sizes.w), long(sizes.k), long(sizes.out),
             sizes.bottleneck ? "bottleneck" : "basic", long(sizes.stride), name(kind), v.x, v.y, v.external, v.weight, threads);
    run_case(g, kind, dtype, wish.request, wish.name, v);
  };
  int turn = 0;  // small blocks: the number of threads; large ones: everything else
  for (const Geometry& sizes : kGeometries) {
    for (const Kind kind : kKinds) {
      const BlockProblem g = block_problem(sizes, kind, ++number);
      for (const KernelTable* table : available_tables()) {
        for (int dtype = 0; dtype < kCpuDTypes; ++dtype) {
          for (const Wish& wish : kWishes) {
            run(g, sizes, kind, table, DType(dtype), wish, kThreads[turn % 4], sizes.h == 27 && turn % 5 == 0);
            ++turn;
          }
        }
        ++turn;
      }
    }
  }
  for (const Geometry& sizes : kLarge) {
    for (const Kind kind : kKinds) {
      const BlockProblem g = block_problem(sizes, kind, ++number);
      for (const KernelTable* table : available_tables()) {
        for (const int threads : kThreads) {
          run(g, sizes, kind, table, DType(turn % kCpuDTypes), kWishes[turn / kCpuDTypes % 5], threads);
          ++turn;
        }
        ++turn;
      }
    }
  }
  // So many channels that a convolution of one image takes two phases, also in one thread.
  const Geometry deep{2, cache_sizes().l2 / (36 * 4 * 8), 14, 13, 3, 5, false, 1, 1};
  for (const Kind kind : {Kind::none, Kind::external, Kind::projection}) {
    const BlockProblem g = block_problem(deep, kind, ++number);
    for (const KernelTable* table : available_tables()) {
      for (int dtype = 0; dtype < kCpuDTypes; ++dtype) run(g, deep, kind, table, DType(dtype), kWishes[4], 1);
    }
  }
  if (all_cases()) expect_hits();
}

}  // namespace memory
