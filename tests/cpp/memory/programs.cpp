// Programs of several sections: a stem, a pooling and residual blocks as one call must give, bit for bit, what each section gives as a
// program of its own, from tensors between them that are not the program's.
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>

#include "block_problem.h"
#include "by_hand.h"
#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "reference.h"

using namespace fused_resnet;

namespace memory {
namespace {

struct Size {
  i64 c, h, w;
};

// What a section is made of: a block, or a pooling in its place.
struct Piece {
  enum Kind { block_, max_pool, mean_pool, added_twice } kind = block_;  // added_twice: its input, to its second and to its third layer
  BlockShape block;
  PoolShape window;  // of a pooling, its output at least
  std::vector<std::unique_ptr<Tensor>> weight, bias;  // of its convolutions in the program's order

  Size output() const {
    if (kind == max_pool || kind == mean_pool) return {block.c, window.p, window.q};
    const Layer& last = block.main.back();
    return {last.k, last.p, last.q};
  }
  int add(Network& network, int in) const {
    network.section();
    if (kind == max_pool) return network.max_pool(in, window);
    if (kind == mean_pool) return network.mean_pool(in);
    if (kind == added_twice) {
      const int first = network.convolution(in, block.main[0]);
      return network.convolution(network.convolution(first, block.main[1], in), block.main[2], in);
    }
    const Size out = output();
    const bool padded = block.kind == Shortcut::external;
    return add_block(network, block, in, padded ? network.zero_pad(in, out.c, (out.c - block.c) / 2, 2, 2) : Network::kNone);
  }
};

Layer layer(i64 k, i64 size, Size in, i64 stride, bool relu) {
  Layer l;
  l.k = k, l.r = l.s = size, l.stride_h = l.stride_w = stride, l.pad_top = l.pad_left = size / 2;
  l.p = (in.h + 2 * l.pad_top - size) / stride + 1, l.q = (in.w + 2 * l.pad_left - size) / stride + 1;
  l.has_bias = true, l.relu = relu;
  return l;
}

// Small values with fractions: what is added in another order differs.
std::unique_ptr<Tensor> random_tensor(DType dtype, i64 n, i64 c, i64 h, i64 w, const Strides& strides, std::mt19937& random) {
  auto made = std::make_unique<Tensor>(dtype, n, c, h, w, strides);
  Values values(std::size_t(n * c * h * w), 0.0);
  for (double& v : values) v = (double(random() % 2001) - 1000) / 4000;
  made->set(values);
  return made;
}

Strides dense(Size s, bool channels_last) {
  return channels_last ? Strides{s.c * s.h * s.w, 1, s.w * s.c, s.c} : Strides{s.c * s.h * s.w, s.h * s.w, s.w, 1};
}

class Pieces {
 public:
  Pieces(DType dtype, i64 n, Size input, std::mt19937& random) : dtype_(dtype), n_(n), now_(input), random_(random) {}

  void pool() {
    Piece p;
    p.kind = Piece::max_pool;
    p.block.c = now_.c;
    PoolShape& s = p.window;
    s.kernel_h = s.kernel_w = 3, s.stride_h = s.stride_w = 2, s.pad_top = s.pad_left = 1;
    s.p = (now_.h - 1) / 2 + 1, s.q = (now_.w - 1) / 2 + 1;
    push(std::move(p));
  }
  // The mean of each channel and a linear layer.
  void head(i64 k) {
    Piece p;
    p.kind = Piece::mean_pool;
    p.block.c = now_.c;
    p.window.p = p.window.q = 1;
    push(std::move(p));
    block({layer(k, 1, now_, 1, false)}, Shortcut::none, {});
  }
  void stem(i64 k, i64 size, i64 stride) { block({layer(k, size, now_, stride, true)}, Shortcut::none, {}); }
  void basic(i64 k, i64 stride) {
    const Layer first = layer(k, 3, now_, stride, true), second = layer(k, 3, {k, first.p, first.q}, 1, true);
    if (stride == 1 && k == now_.c) return block({first, second}, Shortcut::identity, {});
    block({first, second}, Shortcut::projection, layer(k, 1, now_, stride, false));
  }
  // Its shortcut: every other pixel, and channels of zeros.
  void padded(i64 k) {
    const Layer first = layer(k, 3, now_, 2, true);
    block({first, layer(k, 3, {k, first.p, first.q}, 1, true)}, Shortcut::external, {});
  }
  // One layer, which reads what it adds; and a layer to which is added what is added again later.
  void residual_layer() { block({layer(now_.c, 3, now_, 1, true)}, Shortcut::identity, {}); }
  void added_twice() {
    const Layer same = layer(now_.c, 3, now_, 1, true);
    block({same, same, same}, Shortcut::none, {}, Piece::added_twice);
  }
  void bottleneck(i64 k, i64 out, i64 stride) {
    const Layer first = layer(k, 1, now_, 1, true), second = layer(k, 3, {k, first.p, first.q}, stride, true);
    const Layer third = layer(out, 1, {k, second.p, second.q}, 1, true);
    if (stride == 1 && out == now_.c) return block({first, second, third}, Shortcut::identity, {});
    block({first, second, third}, Shortcut::projection, layer(out, 1, now_, stride, false));
  }
  std::vector<Piece> all;

 private:
  void block(std::vector<Layer> main, Shortcut kind, const Layer& projection, Piece::Kind how = Piece::block_) {
    Piece p;
    p.kind = how;
    BlockShape& s = p.block;
    s.n = n_, s.c = now_.c, s.h = now_.h, s.w = now_.w, s.main = std::move(main), s.kind = kind, s.projection = projection;
    i64 c = s.c;
    const auto add = [&](const Layer& l, i64 channels) {
      p.weight.push_back(random_tensor(dtype_, l.k, channels, l.r, l.s, {channels * l.r * l.s, l.r * l.s, l.s, 1}, random_));
      p.bias.push_back(random_tensor(dtype_, l.k, 1, 1, 1, {1, 0, 0, 0}, random_));
    };
    if (kind == Shortcut::projection) add(projection, c);
    for (const Layer& l : s.main) add(l, c), c = l.k;
    push(std::move(p));
  }
  void push(Piece piece) {
    now_ = piece.output();
    all.push_back(std::move(piece));
  }

  DType dtype_;
  i64 n_;
  Size now_;
  std::mt19937& random_;
};

// The packed weights and the biases of a program's convolutions, from those of its sections in order.
struct Packed {
  std::vector<std::unique_ptr<Guarded>> memory;
  std::vector<std::unique_ptr<Tensor>> sums;  // biases of a convolution and the projection that is joined to it
  std::vector<const void*> weight, bias;

  Packed(const Program& program, DType dtype, const std::vector<const Piece*>& pieces) {
    std::vector<const Tensor*> weights, biases;
    for (const Piece* piece : pieces) {
      for (const auto& t : piece->weight) weights.push_back(t.get());
      for (const auto& t : piece->bias) biases.push_back(t.get());
    }
    for (std::size_t i = 0; i < program.convolutions(); ++i) {
      const Convolution* convolution = program.convolution(i);
      weight.push_back(nullptr), bias.push_back(nullptr);
      if (convolution == nullptr) continue;
      memory.push_back(std::make_unique<Guarded>(convolution->packed_bytes()));
      memory.back()->fill(0xff);
      const Tensor* joined = nullptr;
      bias.back() = biases[i]->data();
      for (std::size_t j = 0; j < program.convolutions(); ++j) {
        if (program.joined_to(j) != int(i)) continue;
        joined = weights[j];
        Values sum = biases[i]->values(), more = biases[j]->values();
        for (std::size_t k = 0; k < sum.size(); ++k) sum[k] += more[k];
        sums.push_back(std::make_unique<Tensor>(dtype, i64(sum.size()), 1, 1, 1, Strides{1, 0, 0, 0}));
        sums.back()->set(sum);
        bias.back() = sums.back()->data();
      }
      const WeightView other = joined ? WeightView{joined->data(), joined->strides()} : WeightView{};
      expect(convolution->pack({weights[i]->data(), weights[i]->strides()}, other, memory.back()->get()), "the weight is finite");
      weight.back() = memory.back()->get();
    }
  }
  bool intact() const {
    return std::all_of(memory.begin(), memory.end(), [](const auto& m) { return m->intact(); });
  }
};

void run_case(const Pieces& made, DType dtype, i64 n, Size input, bool channels_last, int threads, std::mt19937& random) {
  const std::vector<Piece>& pieces = made.all;
  const Size last = pieces.back().output();
  const auto x = random_tensor(dtype, n, input.c, input.h, input.w, dense(input, channels_last), random);
  // One after the other.
  std::vector<std::unique_ptr<Tensor>> values;
  const Tensor* in = x.get();
  Size size = input;
  for (const Piece& piece : pieces) {
    const Size out = piece.output();
    const bool turned = &piece == &pieces.back() && !channels_last;
    values.push_back(std::make_unique<Tensor>(dtype, n, out.c, out.h, out.w, dense(out, !turned)));
    Network network(n);
    piece.add(network, network.input(size.c, size.h, size.w, in->strides()));
    const Program program(network, values.back()->strides(), dtype, threads, {});
    const Packed packed(program, dtype, {&piece});
    const void* const inputs[] = {in->data()};
    expect(run_afresh(program, ProgramOperands{inputs, packed.weight.data(), packed.bias.data(), values.back()->data()}), "finite");
    in = values.back().get();
    size = out;
  }
  // At once.
  Network network(n);
  int value = network.input(input.c, input.h, input.w, x->strides());
  std::vector<const Piece*> all;
  for (const Piece& piece : pieces) value = piece.add(network, value), all.push_back(&piece);
  Tensor by_run(dtype, n, last.c, last.h, last.w, in->strides()), y(dtype, n, last.c, last.h, last.w, in->strides());
  const Program program(network, y.strides(), dtype, threads, {});
  const Packed packed(program, dtype, all);
  const void* const inputs[] = {x->data()};
  ProgramOperands operands{inputs, packed.weight.data(), packed.bias.data(), by_run.data()};
  const auto intact = [&] { return x->intact() && by_run.intact() && y.intact() && packed.intact(); };
  expect(run_afresh(program, operands), "finite");
  expect(intact(), "guard bytes");
  expect(by_run.same_bits(*in), "a program gives what its sections give one by one");
  operands.y = y.data();
  expect(by_hand(program, operands), "guard bytes of the workspaces, and finite");
  expect(intact(), "guard bytes after the tasks by hand");
  expect(y.same_bits(by_run), "the same bits in any order of tasks");
  y.poison();
  expect(by_team(program, operands), "guard bytes of a team's workspaces, and finite");
  expect(intact() && y.same_bits(by_run), "the same bits from a team of another size");
  y.poison();
  Guarded workspace(program.workspace_bytes());
  std::vector<int> nodes;
  for (std::size_t i = 0; i < program.stages().size(); ++i) {
    expect(program.run_stage(i, operands, workspace.get()), "finite");
    for (const int node : program.stages()[i].nodes) nodes.push_back(node);
  }
  expect(intact() && workspace.intact() && y.same_bits(by_run), "the same bits stage by stage");
  std::sort(nodes.begin(), nodes.end());
  for (std::size_t i = 0; i < nodes.size(); ++i) expect(nodes[i] == int(i), "each node is in one stage");
  expect(n == 0 || nodes.size() >= program.convolutions(), "all nodes are in the stages");
  // If a guard holds, which the threads look at together: of the packed weights, as memory like any other.
  if (packed.memory.empty()) return;
  y.poison();
  Guard guard;
  for (std::size_t i = 0; i < program.convolutions(); ++i) {
    const Convolution* convolution = program.convolution(i);
    if (convolution != nullptr) guard.add(packed.weight[i], convolution->packed_bytes(), i64(1) << 30);
  }
  expect(program.run_if(guard, operands) == true && intact() && y.same_bits(by_run), "the same bits where a guard holds");
  char* const byte = packed.memory.back()->get();
  *byte ^= 1;
  expect(!program.run_if(guard, operands).has_value(), "nothing where a guard does not hold");
  *byte ^= 1;
}

// A zero-padded shortcut by itself, against its definition.
void run_zero_pad(ZeroPadShape s, DType dtype, i64 h, i64 w, int x_layout, int y_layout) {
  std::mt19937 random(5);
  const Values values = integers(s.n * s.c * h * w, 9, random);
  Tensor x(dtype, s.n, s.c, h, w, layout(x_layout, s.c, h, w)), y(dtype, s.n, s.k, s.p, s.q, layout(y_layout, s.k, s.p, s.q));
  x.set(values);
  s.x = x.strides(), s.y = y.strides();
  const ZeroPad pad(s, bytes_of(dtype));
  Operands operands;
  operands.x = x.data(), operands.y = y.data();
  expect(by_hand(pad, operands), "guard bytes of the workspaces, and finite");
  expect(x.intact() && y.intact(), "guard bytes");
  expect(y.gaps_are_nan(), "nothing is written between the elements");
  Values expected;
  for (i64 n = 0; n < s.n; ++n)
    for (i64 k = 0; k < s.k; ++k)
      for (i64 p = 0; p < s.p; ++p)
        for (i64 q = 0; q < s.q; ++q) {
          const i64 c = k - s.before;
          const bool there = c >= 0 && c < s.c;
          expected.push_back(there ? values[std::size_t(((n * s.c + c) * h + p * s.stride_h) * w + q * s.stride_w)] : 0);
        }
  expect(y.values() == expected, "strided pixels between channels of zeros");
}

// The mean of 16 pixels, of integers: exact.
void run_mean_pool(DType dtype, i64 n, i64 c, i64 pitch) {
  std::mt19937 random(6);
  const Values values = integers(n * c * 16, 9, random);
  Tensor x(dtype, n, c, 2, 8, {16 * pitch + 3 * (pitch - c), 1, 8 * pitch, pitch}), y(dtype, n, c, 1, 1, {pitch, 1, 1, 1});
  x.set(values);
  const MeanPool pool(MeanPoolShape{n, c, 2, 8, x.strides(), y.strides()}, dtype);
  Operands operands;
  operands.x = x.data(), operands.y = y.data();
  expect(by_hand(pool, operands), "guard bytes of the workspaces, and finite");
  expect(x.intact() && y.intact(), "guard bytes");
  expect(y.gaps_are_nan(), "nothing is written between the elements");
  Values expected;
  for (std::size_t i = 0; i < values.size(); i += 16) {
    double sum = 0;
    for (std::size_t j = 0; j < 16; ++j) sum += values[i + j];
    expected.push_back(rounded(dtype, sum / 16));
  }
  expect(y.values() == expected, "means");
}

void mean_pools() {
  for (const KernelTable* table : available_tables()) {
    for (int dtype = 0; dtype < kCpuDTypes; ++dtype) {
      for (const i64 c : {1, 7, 16, 37, 515, 1040}) {
        if (!take()) continue;
        set_isa(table->isa);
        describe("mean pool %s %s of %ld channels", table->isa, name(DType(dtype)), long(c));
        run_mean_pool(DType(dtype), 3, c, c + c % 4);
        run_mean_pool(DType(dtype), 0, c, c);
      }
    }
  }
}

void zero_pads() {
  for (int dtype = 0; dtype < kCpuDTypes; ++dtype) {
    for (int x_layout = 0; x_layout < kLayouts; ++x_layout) {
      for (int y_layout = 0; y_layout < kLayouts; ++y_layout) {
        for (const i64 stride_w : {1, 3}) {
          if (!take()) continue;
          const i64 h = 7, w = 10;
          ZeroPadShape s;
          s.n = 2, s.c = 5, s.k = 5 + x_layout + y_layout, s.before = y_layout, s.stride_h = 2, s.stride_w = stride_w;
          s.p = 4, s.q = (w + stride_w - 1) / stride_w;
          describe("zero pad %s, layouts %d %d, stride %ld", name(DType(dtype)), x_layout, y_layout, long(stride_w));
          run_zero_pad(s, DType(dtype), h, w, x_layout, y_layout);
        }
      }
    }
  }
}

std::atomic<bool> shared_workspace{false};
void expect_of_thread(bool ok) {
  if (!ok) shared_workspace = true;
}

// Workspaces: two at a time are two, one that is given back is taken again where it is large enough, and no more is kept than there may be.
void workspaces() {
  describe("workspaces");
  Workspace::release();
  char *small, *large;
  {
    const Workspace a(1000), b(5000);
    small = a.data(), large = b.data();
    expect(small != large && reinterpret_cast<std::uintptr_t>(small) % 64 == 0, "two, aligned");
    std::memset(small, 1, 1000), std::memset(large, 1, 5000);
  }
  {
    const Workspace a(900), b(900);
    expect(a.data() == small && b.data() == large, "the smallest that is large enough");
  }
  {
    const Workspace a(6000);
    std::memset(a.data(), 1, 6000);
    const Workspace b(1000);
    expect(b.data() == small, "where none is large enough, the largest made room");
  }
  { const Workspace none(0); }
  Workspace::release();
  { const Workspace all(Workspace::kKept), more(64); }
  expect(Workspace::kept() == 64, "what would be too much is freed");
  Workspace::release();
  expect(Workspace::kept() == 0, "nothing is kept after a release");
  const auto use = [](int number) {
    for (i64 bytes = 64; bytes < 20000; bytes += 640) {
      const Workspace mine(bytes);
      std::memset(mine.data(), number, std::size_t(bytes));
      for (i64 i = 0; i < bytes; i += 63) expect_of_thread(mine.data()[i] == number);
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) threads.emplace_back(use, t);
  for (std::thread& thread : threads) thread.join();
  expect(!shared_workspace, "no two threads have the same");
}

// A program that a caller must not get.
void expect_refused(const char* what, const std::function<void(Network&)>& build) {
  describe("%s", what);
  bool refused = false;
  try {
    Network network(1);
    build(network);
    const Program program(network, dense({1, 1, 1}, true), DType::float32, 1, {});
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "std::invalid_argument");
}

}  // namespace

void programs() {
  zero_pads();
  mean_pools();
  workspaces();
  const Size input{3, 21, 18};
  int turn = 0;
  for (const KernelTable* table : available_tables()) {
    for (int dtype = 0; dtype < kCpuDTypes; ++dtype) {
      for (const i64 n : {0, 1, 2, 5}) {
        for (const int threads : {1, 2, 3}) {
          if (!take(n == 5 && threads == 2)) continue;
          set_isa(table->isa);
          std::mt19937 random(unsigned(++turn));
          Pieces pieces(DType(dtype), n, input, random);
          pieces.stem(16, turn % 2 ? 7 : 3, 2);
          pieces.pool();
          pieces.basic(16, 1);
          pieces.basic(20, 2);
          pieces.residual_layer();
          pieces.added_twice();
          pieces.bottleneck(8, 33, 1);
          pieces.bottleneck(9, 33, 1);
          if (turn % 3 == 0) pieces.basic(64, 1);
          if (turn % 3 == 1) pieces.padded(40);
          if (turn % 2 == 1) pieces.head(turn % 5 == 0 ? 700 : 21);
          describe("program %s %s n=%ld threads=%d, turn %d", table->isa, name(DType(dtype)), long(n), threads, turn);
          run_case(pieces, DType(dtype), n, input, turn % 4 < 2, threads, random);
        }
      }
    }
  }
  // Layers for several threads in front of small ones, which are for one of them and write over what they add.
  const Size large{16, 40, 40};
  for (const KernelTable* table : available_tables()) {
    for (const int threads : {2, 3}) {
      if (!take(threads == 2)) continue;
      set_isa(table->isa);
      std::mt19937 random(unsigned(++turn));
      Pieces pieces(DType::float32, 1, large, random);
      pieces.stem(64, 3, 1);
      pieces.basic(64, 1);
      pieces.residual_layer();  // of several tasks, which read each other's pixels
      pieces.pool();
      pieces.pool();
      for (int i = 0; i < 6; ++i) pieces.bottleneck(4, 64, 1);
      describe("program %s of large and small layers, threads=%d", table->isa, threads);
      run_case(pieces, DType::float32, 1, large, true, threads, random);
    }
  }
  const Layer one = layer(1, 1, {1, 1, 1}, 1, false);
  expect_refused("a network of nothing", [](Network&) {});
  expect_refused("a value that is not there", [&](Network& n) { n.convolution(0, one); });
  expect_refused("a shortcut of another shape", [&](Network& n) {
    const int x = n.input(1, 1, 1, dense({1, 1, 1}, true));
    n.convolution(x, one, n.input(2, 1, 1, dense({2, 1, 1}, true)));
  });
  expect_refused("a section that is read in the middle", [&](Network& n) {
    const int x = n.input(1, 1, 1, dense({1, 1, 1}, true)), middle = n.convolution(x, one);
    n.convolution(middle, one);
    n.section();
    n.convolution(middle, one);
  });
}

}  // namespace memory
