// Several steps as one call: a residual block, a chain of them, a whole network. One job of a team, and what lies between the steps
// in memory that is planned beforehand.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "convolution.h"
#include "fingerprint.h"
#include "max_pool.h"
#include "mean_pool.h"
#include "zero_pad.h"

namespace fused_resnet {

// One convolution but for its input, which the program knows.
struct Layer {
  i64 k = 0, r = 0, s = 0, p = 0, q = 0;
  i64 stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dilation_h = 1, dilation_w = 1;
  bool has_bias = false, relu = false;
};

// What a program computes: nodes in the order in which they run, each of values that are there before; the last one's is the output.
class Network {
 public:
  static constexpr int kNone = -1;

  explicit Network(i64 images) : images_(images) {}

  // Each returns the number of its value [images, channels, h, w]. They throw std::invalid_argument for numbers and sizes that do not
  // fit together.
  int input(i64 channels, i64 h, i64 w, const Strides& strides);
  int convolution(int in, const Layer& layer, int shortcut = kNone);
  int max_pool(int in, const PoolShape& window);  // its kernel, stride, padding and output alone
  int mean_pool(int in);
  int zero_pad(int in, i64 channels, i64 before, i64 stride_h, i64 stride_w);

  // The nodes from here on are a section of their own. A section (a residual block) reads one value of those before, besides inputs,
  // and is read in its last value alone.
  void section() { next_section_ = true; }

 private:
  friend class Program;

  struct Value {
    i64 c = 0, h = 0, w = 0;
    int input = kNone;  // the number of the operand
    Strides strides;    // an input's
  };
  struct Node {
    enum Kind { convolution, max_pool, mean_pool, zero_pad } kind = convolution;
    Layer layer;         // of a convolution
    PoolShape window;    // of a pooling
    ZeroPadShape zeros;  // of a zero-padded shortcut
    int in = kNone, shortcut = kNone, out = kNone;  // values
    int index = kNone;                              // of a convolution among all
    int number = kNone;                             // of the node among all, in the order in which they were added
    int joined_number = kNone;                      // of the projection that is a part of this node
    int joined = kNone;                             // the value that a projection reads which is further terms of this convolution's sums
    i64 joined_stride_h = 1, joined_stride_w = 1;
    bool begins_section = false;
  };

  const Value& value(int number) const;
  int add(Node node, i64 c, i64 h, i64 w);
  bool joins(const Node& last, const Node& projection) const;
  ConvShape shape_of(const Node& node, i64 images) const;  // without strides

  // Makes a projection further terms of the convolution to which it is added, wherever that is possible.
  void join_projections();

  i64 images_;
  int inputs_ = 0, added_ = 0;
  std::vector<int> joined_to_;  // of each convolution: kNone, or the number of the one that it became a part of
  std::vector<Value> values_;
  std::vector<Node> nodes_;
  bool next_section_ = true;
};

// Arrays: of the network's inputs in order; of the packed weights and the biases of its convolutions in order. Where a projection was joined
// to another convolution, that one's packed weight is both, its bias the sum, and the projection's are not read.
struct ProgramOperands {
  const void* const* inputs = nullptr;
  const void* const* weight = nullptr;
  const void* const* bias = nullptr;
  void* y = nullptr;
};

class Program {
 public:
  // y: the output's strides. Throws as Convolution::make.
  Program(Network network, const Strides& y, DType dtype, int threads, const Request& request);

  // As Convolution::run; false: to be computed by a program of direct convolutions.
  bool run(const ProgramOperands& operands) const;

  // The same, if `guard` holds, which all threads look at together; nothing: it does not, and what was written to y is of no use.
  std::optional<bool> run_if(const Guard& guard, const ProgramOperands& operands) const;

  // Of the network's convolutions in order, for packing and for what they say. Null: joined to the convolution `joined_to(i)`.
  const Convolution* convolution(std::size_t i) const { return convolution_.at(i); }
  int joined_to(std::size_t i) const { return network_.joined_to_.at(i); }
  std::size_t convolutions() const { return convolution_.size(); }
  std::string describe() const;

  // What a run does one after the other, for whoever watches it: each step, or a section that goes depth first.
  struct Stage {
    std::vector<int> nodes;  // by their numbers in the order in which the network got them
    std::string what;
    std::size_t begin, end;  // phases
  };
  const std::vector<Stage>& stages() const { return stages_; }

  // One stage of `run`, in a workspace of workspace_bytes() where those before it have run. False: as `run`.
  bool run_stage(std::size_t i, const ProgramOperands& operands, char* workspace) const;

  // As Step's, for whoever runs the tasks on threads of its own; `run` is these as one job of a team. The phases of a section are
  // those of one step after the other, for all images; or, depth first, there is one phase, whose tasks are groups of images.
  int phases() const { return int(phases_.size()); }
  i64 tasks(int phase) const { return phases_[std::size_t(phase)].tasks; }
  bool alone(int phase) const { return phases_[std::size_t(phase)].alone; }
  bool run_task(int phase, i64 index, const ProgramOperands& operands, char* shared, char* mine) const noexcept;
  i64 shared_bytes() const { return arena_ + shared_; }
  i64 thread_bytes() const { return thread_; }
  int threads() const { return threads_; }
  i64 workspace_bytes() const { return shared_bytes() + checked_product(thread_bytes(), threads_); }

 private:
  // Where a value is: an operand, or so many bytes behind the start of the arena or of a thread's own memory. `image`: bytes from one
  // image to the next.
  struct Place {
    enum Kind { none, input, output, arena, own } kind = none;
    int operand = 0;
    i64 offset = 0, image = 0;
  };
  struct Planned {
    std::unique_ptr<Step> step;
    int weight = Network::kNone;  // its number
    Place in, shortcut, joined, out;
  };
  // A section's steps for so many images at a time, and the memory that they take of a thread (depth first) or of all.
  struct Plan {
    i64 images = 0;
    std::vector<Planned> steps;
    i64 values = 0, shared = 0, thread = 0;
  };
  struct Section {
    std::size_t begin = 0, end = 0;  // nodes of the network
    bool depth_first = false;
    int threads = 1;
    i64 images = 1;           // at a time; all but depth first
    std::vector<Plan> plans;  // one; or, depth first, for full groups and for the last one
  };
  // The nodes that make and last read a value, and the section that makes it.
  struct Use {
    std::size_t made = 0, read = 0, section = 0;
    bool is_made = false;
  };
  struct Phase {
    std::size_t section, step;
    int phase;  // of the step
    i64 tasks;
    bool alone;  // for one thread: what the others would take of it costs more than it saves
  };

  void cut_sections();
  void name_stages();
  void choose_schedule(Section& section) const;
  std::vector<Use> uses() const;
  bool is_own(const Use& use, int value) const;
  int overwritten(const Network::Node& node, std::size_t index, const std::vector<Use>& uses) const;
  void place_values(const std::vector<Use>& uses);
  Plan plan(const Section& section, i64 images, const std::vector<Use>& uses, const Request& request) const;
  std::unique_ptr<Step> make(const Network::Node& node, i64 images, int threads, const Request& request) const;
  Strides strides_of(int value) const;
  i64 image_bytes(int value) const;
  Operands operands_of(const Planned& planned, const ProgramOperands& operands, i64 image, char* arena, char* own) const noexcept;

  Network network_;
  Strides y_;
  DType dtype_;
  int threads_;
  i64 bytes_;  // of an element
  std::vector<Section> sections_;
  std::vector<Place> places_;  // of the values between sections or inside of one that goes layer by layer
  std::vector<Phase> phases_;
  std::vector<Stage> stages_;
  std::vector<const Convolution*> convolution_;
  i64 arena_ = 0, shared_ = 0, thread_ = 0;
};

}  // namespace fused_resnet
