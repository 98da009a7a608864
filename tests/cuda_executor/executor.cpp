#include "executor.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <queue>
#include <random>

#include <cxxabi.h>
#include <dlfcn.h>

#include "device.h"
#include "fiber.h"
#include "running.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace executor {
namespace {

constexpr unsigned kLanes = 32;

std::string at(Site site) {
  const std::string path = site.file;
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(site.line);
}

enum class Wait { kNone, kBarrier, kWarpBarrier, kShuffle, kBallot };

struct Thread {
  uint3 index;
  bool done = false;
  uint32_t priority = 0; // within its warp
  unsigned warp_barriers = 0;

  // What it waits for, what it brings, and what it gets.
  Wait wait = Wait::kNone;
  Site site{};
  unsigned mask = 0;
  uint64_t value = 0;
  int source = 0;
  uint64_t result = 0;
};

uint3 unflatten(uint64_t i, dim3 size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

Memory& shared_and_global() {
  static Memory value;
  return value;
}

std::vector<std::unique_ptr<Fiber>>& fibers() {
  static std::vector<std::unique_ptr<Fiber>> value;
  return value;
}

// One launch at a time, of one block at a time.
class Launch {
 public:
  Launch(const fastjac::Geometry& g, void (*invoke)(void*), void* call, uint64_t seed);

  void run();
  void wait(Wait kind, Site site, unsigned mask, uint64_t value, int source = 0);
  void wait_in_warp(Wait kind, Site site, unsigned mask, uint64_t value, int source = 0);
  [[noreturn]] void stop(std::string what);
  [[noreturn]] void body();

  Thread& thread() {
    return threads_[running_];
  }
  Accessor accessor() const {
    return {running_, threads_[running_].warp_barriers};
  }
  bool holds(const void* address) const {
    return fibers()[running_]->holds(address);
  }
  unsigned lane() const {
    return running_ % kLanes;
  }
  unsigned lanes_of_warp(unsigned warp) const {
    return std::min<unsigned>(kLanes, unsigned(threads_.size()) - warp * kLanes);
  }

  Memory& memory;
  Vote vote = Vote::kNone;

 private:
  using Ready = std::pair<uint64_t, unsigned>; // priority, thread

  void run_block();
  void schedule(unsigned thread);
  void draw_priorities();
  bool release_block();
  void release_warp(unsigned warp);
  std::string stuck() const;
  std::string name(unsigned thread) const;

  const fastjac::Geometry geometry_;
  void (*const invoke_)(void*);
  void* const call_;
  std::mt19937_64 random_;
  bool warp_by_warp_;
  std::vector<Thread> threads_;
  std::vector<uint32_t> warp_priorities_;
  std::priority_queue<Ready> ready_;
  unsigned running_ = 0;
  std::optional<std::string> problem_;
};

Launch* launch = nullptr;

// Whether accesses are a kernel's own, and not the executor's (whose standard library may be the
// kernels' instance of it, with their hooks).
bool watching = false;

// Within the functions that a kernel calls.
struct Unwatched {
  const bool before = std::exchange(watching, false);
  ~Unwatched() {
    watching = before;
  }
};

Launch::Launch(const fastjac::Geometry& g, void (*invoke)(void*), void* call, uint64_t seed)
    : memory(shared_and_global()), geometry_(g), invoke_(invoke), call_(call), random_(seed) {
  warp_by_warp_ = random_() % 2 == 0;
  const uint64_t threads = uint64_t(g.threads.x) * g.threads.y * g.threads.z;
  const uint64_t blocks = uint64_t(g.blocks.x) * g.blocks.y * g.blocks.z;
  // What a device would refuse.
  if (threads == 0 || threads > 1024 || g.threads.z > 64) {
    throw Fault("launch: a block has 1 to 1024 threads, not " + std::to_string(threads));
  }
  if (blocks == 0 || g.blocks.x > 0x7fffffffu || g.blocks.y > 65535 || g.blocks.z > 65535) {
    throw Fault("launch: an impossible grid of " + std::to_string(blocks) + " blocks");
  }
  if (g.shared > kDynamicShared) {
    throw Fault("launch: too much dynamic shared memory: " + std::to_string(g.shared));
  }
  threads_.resize(threads);
  warp_priorities_.resize((threads + kLanes - 1) / kLanes);
  while (fibers().size() < threads) fibers().push_back(std::make_unique<Fiber>());
}

std::string Launch::name(unsigned thread) const {
  const uint3 t = threads_[thread].index, b = blockIdx;
  const auto triple = [](uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
  };
  return "thread " + triple(t) + " of block " + triple(b);
}

void Launch::run() {
  std::vector<uint64_t> order(
      uint64_t(geometry_.blocks.x) * geometry_.blocks.y * geometry_.blocks.z
  );
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  blockDim = geometry_.threads;
  gridDim = geometry_.blocks;
  for (const uint64_t block : order) {
    blockIdx = unflatten(block, geometry_.blocks);
    memory.begin_block(unsigned(block));
    run_block();
  }
}

void Launch::run_block() {
  for (unsigned i = 0; i < threads_.size(); ++i) {
    threads_[i] = {};
    threads_[i].index = unflatten(i, geometry_.threads);
    fibers()[i]->start([] { launch->body(); });
  }
  draw_priorities();
  for (unsigned i = 0; i < threads_.size(); ++i) schedule(i);

  size_t done = 0;
  while (done < threads_.size()) {
    while (!ready_.empty()) {
      running_ = ready_.top().second;
      ready_.pop();
      threadIdx = thread().index;
      watching = true;
      fibers()[running_]->resume();
      watching = false;
      if (problem_) throw Fault(name(running_) + " " + *problem_);
      if (thread().done) {
        ++done;
      } else if (thread().wait != Wait::kBarrier) {
        release_warp(running_ / kLanes);
      }
    }
    if (done < threads_.size() && !release_block()) throw Fault(stuck());
  }
}

void Launch::body() {
  fibers()[running_]->entered();
  invoke_(call_);
  watching = false;
  thread().done = true;
  fibers()[running_]->suspend();
  __builtin_unreachable();
}

// What is still on the fiber's stack is never destroyed: `what` is moved out of it.
void Launch::stop(std::string what) {
  problem_ = std::move(what);
  fibers()[running_]->suspend();
  __builtin_unreachable();
}

void Launch::draw_priorities() {
  for (Thread& t : threads_) t.priority = uint32_t(random_());
  for (uint32_t& p : warp_priorities_) p = uint32_t(random_());
}

void Launch::schedule(unsigned thread) {
  const uint64_t warp = warp_priorities_[thread / kLanes];
  ready_.emplace(warp_by_warp_ ? warp << 32 | threads_[thread].priority : random_(), thread);
}

void Launch::wait(Wait kind, Site site, unsigned mask, uint64_t value, int source) {
  Thread& t = thread();
  t.wait = kind;
  t.site = site;
  t.mask = mask;
  t.value = value;
  t.source = source;
  fibers()[running_]->suspend();
}

void Launch::wait_in_warp(Wait kind, Site site, unsigned mask, uint64_t value, int source) {
  const unsigned lanes = lanes_of_warp(running_ / kLanes);
  const unsigned exist = lanes == kLanes ? ~0u : (1u << lanes) - 1;
  std::string problem;
  if ((mask & ~exist) != 0) {
    problem = "for lanes that its warp does not have";
  } else if (!(mask >> lane() & 1)) {
    problem = "with a mask that leaves it out";
  } else if (kind == Wait::kShuffle && (unsigned(source) >= kLanes || !(mask >> source & 1))) {
    problem = "for the value of a lane that is not in its mask";
  }
  if (!problem.empty()) {
    problem = "waits at " + at(site) + " " + problem;
    stop(std::move(problem));
  }
  wait(kind, site, mask, value, source);
}

// Lets the threads pass the barrier, if all of them wait there.
bool Launch::release_block() {
  unsigned count = 0;
  for (const Thread& t : threads_) {
    if (t.done || t.wait != Wait::kBarrier || t.site != threads_[0].site) return false;
    count += t.value != 0;
  }
  const uint64_t result = vote == Vote::kCount ? count
                          : vote == Vote::kAnd ? count == threads_.size()
                                               : count > 0;
  memory.pass_barrier();
  draw_priorities();
  for (unsigned i = 0; i < threads_.size(); ++i) {
    threads_[i].wait = Wait::kNone;
    threads_[i].result = result;
    schedule(i);
  }
  return true;
}

// Lets the lanes that the running thread waits for pass, if all of them wait for each other.
void Launch::release_warp(unsigned warp) {
  const Thread first = thread();
  Thread* lanes = &threads_[warp * kLanes];
  const auto waits = [&](unsigned i) { return first.mask >> i & 1; };
  unsigned ballot = 0;
  for (unsigned i = 0; i < lanes_of_warp(warp); ++i) {
    if (!waits(i)) continue;
    const Thread& t = lanes[i];
    if (t.done || t.wait != first.wait || t.mask != first.mask || t.site != first.site) {
      return;
    }
    ballot |= unsigned(t.value != 0) << i;
  }
  for (unsigned i = 0; i < lanes_of_warp(warp); ++i) {
    if (!waits(i)) continue;
    Thread& t = lanes[i];
    t.result = first.wait == Wait::kShuffle ? lanes[t.source].value : ballot;
    t.warp_barriers += first.wait == Wait::kWarpBarrier;
    t.wait = Wait::kNone;
    schedule(warp * kLanes + i);
  }
}

// Nobody can go on: who waits, and for whom.
std::string Launch::stuck() const {
  const auto waiting =
      std::find_if(threads_.begin(), threads_.end(), [](const Thread& t) { return !t.done; });
  const auto i = unsigned(waiting - threads_.begin());
  const bool in_warp = waiting->wait != Wait::kBarrier;
  std::string text = name(i) + " waits at " + at(waiting->site);
  for (unsigned j = 0; j < threads_.size(); ++j) {
    const Thread& t = threads_[j];
    if (in_warp && (j / kLanes != i / kLanes || !(waiting->mask >> j % kLanes & 1))) continue;
    if (t.done) return text + ", but thread " + std::to_string(j) + " has exited";
    if (t.wait != waiting->wait || t.site != waiting->site || t.mask != waiting->mask) {
      return text + ", but thread " + std::to_string(j) + " waits at " + at(t.site);
    }
  }
  return text + ", for nobody";
}

// Empty where the symbol is not exported.
std::string mangled_name(const void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) == 0 || info.dli_sname == nullptr ? "" : info.dli_sname;
}

std::string kernel_name(const void* kernel) {
  const std::string mangled = mangled_name(kernel);
  if (mangled.empty()) return "a kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  const std::string full = status == 0 ? demangled : mangled;
  std::free(demangled);
  const std::string name = full.substr(0, full.find_first_of("<("));
  return name.substr(name.find_last_of(" :") + 1);
}

std::set<std::string>& launched() {
  static std::set<std::string> value;
  return value;
}

} // namespace

std::set<std::string> take_launched() {
  return std::exchange(launched(), {});
}

Device::Device(uint64_t seed, std::vector<Buffer> buffers)
    : seed_(seed), buffers_(std::move(buffers)) {}

void Device::run(
    const fastjac::Geometry& geometry,
    const void* kernel,
    void (*invoke)(void*),
    void* call,
    size_t call_bytes
) const {
  launched().insert(mangled_name(kernel));
  std::vector<Buffer> buffers = buffers_;
  buffers.push_back({"the kernel's arguments", call, call_bytes, false});
  const struct Reset {
    ~Reset() {
      launch = nullptr;
    }
  } reset;
  try {
    Launch running(geometry, invoke, call, seed_++);
    running.memory.begin_launch(buffers, geometry.shared);
    launch = &running;
    running.run();
  } catch (const Fault& fault) {
    throw Fault(kernel_name(kernel) + ": " + fault.what());
  }
}

void fail(const char* what) {
  if (launch == nullptr) throw Fault(what);
  watching = false;
  launch->stop(what);
}

void note_access(const void* address, size_t bytes, Access access) {
  if (!watching || launch->holds(address)) return;
  const Unwatched executor_runs;
  std::string what = launch->memory.access(address, bytes, access, launch->accessor());
  if (!what.empty()) launch->stop(std::move(what));
}

void atomic_access(const void* address, size_t bytes) {
  note_access(address, bytes, Access::kAtomic);
}

int lane() {
  return int(launch->lane());
}

int barrier(Vote vote, bool predicate, Site site) {
  const Unwatched executor_runs;
  launch->vote = vote;
  launch->wait(Wait::kBarrier, site, 0, predicate);
  return int(launch->thread().result);
}

void warp_barrier(unsigned mask, Site site) {
  const Unwatched executor_runs;
  launch->wait_in_warp(Wait::kWarpBarrier, site, mask, 0);
}

uint64_t shuffle(unsigned mask, uint64_t value, int source, Site site) {
  const Unwatched executor_runs;
  launch->wait_in_warp(Wait::kShuffle, site, mask, value, source);
  return launch->thread().result;
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  const Unwatched executor_runs;
  launch->wait_in_warp(Wait::kBallot, site, mask, predicate);
  return unsigned(launch->thread().result);
}

} // namespace executor
