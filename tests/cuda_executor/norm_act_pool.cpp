#include "norm_act_pool.h"

#include <cstring>
#include <stdexcept>

#include "device.h"
#include "dtypes.h"

#include "../../csrc/cuda/norm_act_pool_backward.cuh"
#include "../../csrc/cuda/norm_act_pool_forward.cuh"
#include "../../csrc/cuda/norm_act_pool_pushforward.cuh"
#include "../../csrc/cuda/norm_act_pool_statistics.cuh"

namespace {

using namespace fastjac::norm_act_pool;

// A call's tensors, and what of them kernels may access.
template <typename scalar_t>
class Tensors {
 public:
  using acc_t = fastjac::accumulator_t<scalar_t>;

  Tensors(const NormActPoolCall& call, const Shape& s) : call_(call) {
    input_ = s.count() * s.channels;
    output_ = s.batch * s.channels * s.out_height * s.out_width;
    channels_ = s.channels;
  }
  scalar_t* like_u(const std::string& name, bool writable = false) {
    return find<scalar_t>(name, input_, writable);
  }
  scalar_t* like_y(const std::string& name, bool writable = false) {
    return find<scalar_t>(name, output_, writable);
  }
  acc_t* channels(const std::string& name, bool writable = false) {
    return find<acc_t>(name, channels_, writable);
  }
  // NaN everywhere.
  template <typename T>
  T* scratch(const std::string& name, int64_t count) {
    scratch_.emplace_back(count * sizeof(T), char(0xff));
    buffers.push_back({name, scratch_.back().data(), scratch_.back().size(), true});
    return reinterpret_cast<T*>(scratch_.back().data());
  }

  std::vector<executor::Buffer> buffers;

 private:
  template <typename T>
  T* find(const std::string& name, int64_t count, bool writable) {
    const auto found = call_.tensors.find(name);
    if (found == call_.tensors.end()) return nullptr;
    T* address = reinterpret_cast<T*>(found->second);
    buffers.push_back({name, address, count * sizeof(T), writable});
    return address;
  }

  const NormActPoolCall& call_;
  int64_t input_, output_, channels_;
  std::vector<std::vector<char>> scratch_;
};

template <typename scalar_t>
Plan run(const NormActPoolCall& call, const Shape& shape) {
  using acc_t = fastjac::accumulator_t<scalar_t>;
  Tensors<scalar_t> t(call, shape);
  if (call.op == "statistics" || call.op == "statistics without values") {
    const auto* u = t.like_u("u");
    const Statistics<acc_t> out{t.channels("mean", true),        t.channels("var", true),
                                t.channels("invstd", true),      t.channels("running_mean", true),
                                t.channels("running_var", true), 0.25,
                                unbiased(shape.count()),         1e-3};
    const Plan plan = plan_statistics(shape, u);
    if (call.op != "statistics") {
      without_values(executor::Device(call.seed, t.buffers), shape.channels, call.flag, out);
      return plan;
    }
    auto* partial = t.template scratch<Moments<double>>("partial", plan.partials(1));
    statistics(executor::Device(call.seed, t.buffers), plan, u, partial, out);
    return plan;
  }
  const Inputs<scalar_t> x{
      t.like_u("u"),
      t.like_u("residual"),
      t.channels("weight"),
      t.channels("bias"),
      t.channels("mean"),
      t.channels("invstd"),
      static_cast<Activation>(call.activation),
      acc_t(call.slope)
  };
  if (call.op == "forward") {
    auto* y = t.like_y("y", true);
    const Plan plan = plan_forward(shape, x, y);
    forward(executor::Device(call.seed, t.buffers), plan, x, y);
    return plan;
  }
  const auto* gy = t.like_y("gy");
  if (call.op == "backward") {
    const BackwardOutputs<scalar_t> out{
        t.like_u("gu", true), t.like_u("gresidual", true), t.channels("gweight", true),
        t.channels("gbias", true)
    };
    const auto* curvature = t.like_u("curvature");
    const auto* coefficient = t.channels("coefficient");
    const Plan plan = plan_backward(shape, x, gy, curvature, out);
    acc_t* partial = nullptr;
    Sums<acc_t>* sums = nullptr;
    if (backward_needs_sums(call.flag, out)) {
      partial = t.template scratch<acc_t>("partial", plan.partials(2));
      sums = t.template scratch<Sums<acc_t>>("sums", shape.channels);
    }
    backward(
        executor::Device(call.seed, t.buffers), plan, x, gy, curvature, coefficient, call.flag, out,
        partial, sums
    );
    return plan;
  }
  if (call.op != "pushforward") throw std::invalid_argument("no operator is called " + call.op);
  const Tangents<scalar_t> tangents{t.like_u("tu"), t.like_u("tresidual"), gy};
  const PushforwardOutputs<scalar_t> out{
      t.like_y("ty", true), t.like_u("kappa", true), t.channels("total", true),
      t.channels("coefficient", true)
  };
  const Plan plan = plan_pushforward(shape, x, tangents, out);
  auto* partial = t.template scratch<acc_t>("partial", plan.partials(call.flag ? 5 : 1));
  auto* sums = t.template scratch<Sums<acc_t>>("sums", shape.channels);
  pushforward(
      executor::Device(call.seed, t.buffers), plan, x, tangents, call.flag, out, partial, sums
  );
  return plan;
}

} // namespace

std::vector<int64_t> run_norm_act_pool(const NormActPoolCall& call) {
  const auto& s = call.shape;
  const Pool pool{call.pool.at(0), call.pool.at(1), call.pool.at(2)};
  const Shape shape{
      s.at(0), s.at(1),           s.at(2), s.at(3), pool.output(s.at(2)), pool.output(s.at(3)),
      pool,    call.channels_last
  };
  std::vector<int64_t> result;
  executor::for_dtype(call.dtype, [&](auto zero) {
    const Plan plan = run<decltype(zero)>(call, shape);
    result = {plan.lanes, plan.cells.chunks, plan.cells.tiles};
  });
  return result;
}
