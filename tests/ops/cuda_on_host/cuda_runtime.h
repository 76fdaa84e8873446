// Stands in for CUDA's header of this name: with it a C++ compiler builds csrc/cuda to run on the host.
//
// A CUDA thread is a coroutine. It runs until it meets a barrier or a warp function; the thread that goes on is chosen
// by the seed: 0 in order, 1 in reverse, others at random, and so for blocks. Blocks run one after the other.
//
// Found: threads that wait at different barriers or exit before one, warp functions that not all lanes of the mask
// reach, bad launches, and, under AddressSanitizer, any access out of bounds. What depends on the order of threads
// shows as results that differ between seeds. Shared memory starts as NaN in every block (not under
// AddressSanitizer, which guards it instead).
//
// Not found: races between two waits in every order that was tried, and anything of weak memory order.
//
// The variable CUDA_ON_HOST_WITHOUT=name.cu:LINE takes out the barrier there, for tests of the tests.
#pragma once

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define __shared__ static  // guarded; AddressSanitizer does not guard thread_local arrays
#else
#define __shared__ static thread_local  // thread_local: it can be found, and nothing else in csrc/cuda is
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = size_t{1} << 16, kGuard = 4096;

struct Site {
  const char* file;
  int line;
  bool operator==(const Site& o) const { return line == o.line && !strcmp(file, o.file); }
};

#if !defined(__x86_64__)
#error "switch_stacks is written for x86-64"
#endif
// Leaves what a function has to keep on the stack and its pointer in `from`, and goes on where `to` was left.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi)\n"
      "mov %rsi, %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

struct Thread {
  enum State { ready, barrier, warp, done } state;
  char* stack;
  void* left_at;
  void* fake_stack;  // AddressSanitizer's
  Site site;
  unsigned mask;
  int partner;
  uint64_t value;
};

class Machine {
 public:
  Machine() {
    const char* without = getenv("CUDA_ON_HOST_WITHOUT");
    if (without) without_ = without;
  }

  void set_seed(uint64_t seed) { random_.seed(seed_ = seed); }

  bool launch(dim3 grid, dim3 block, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> alone(mutex_);
    count_ = static_cast<int>(block.x);
    if (block.x < 1 || block.x > kMostThreads || grid.x < 1 || grid.x > 0x7fffffffu || block.y * block.z != 1 ||
        grid.y * grid.z != 1)
      return false;
    while (static_cast<int>(threads_.size()) < count_) threads_.push_back(new_thread());
    body_ = &body, blockDim = block, gridDim = grid;
    std::vector<unsigned> order(grid.x);
    for (unsigned i = 0; i < grid.x; ++i) order[i] = seed_ == 1 ? grid.x - 1 - i : i;
    if (seed_ > 1) std::shuffle(order.begin(), order.end(), random_);
    const auto [shared, bytes] = shared_memory();
    for (unsigned i : order) {
      blockIdx = {i, 0, 0};
      if (bytes > 0) memset(shared, 0xff, bytes);
      run_block();
    }
    return true;
  }

  void wait_at_barrier(Site site) {
    if (!without_.empty()) {
      const char* slash = strrchr(site.file, '/');
      if (without_ == std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line)) return;
    }
    wait(Thread::barrier, site);
  }

  // What lane `own lane ^ flip` of the warp passed.
  uint64_t exchange(unsigned mask, uint64_t value, int flip, Site site) {
    Thread& t = threads_[current_];
    if (!(mask >> current_ % kWarp & 1)) fail("calls a warp function whose mask leaves it out", site);
    t.mask = mask, t.value = value, t.partner = current_ % kWarp ^ flip;
    wait(Thread::warp, site);
    return t.value;
  }

 private:
  static Thread new_thread() {
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) perror("cuda_on_host: stack"), abort();
    Thread t{};
    t.stack = static_cast<char*>(memory) + kGuard;
    return t;
  }

  [[noreturn]] void fail(const char* what, Site site) const {
    fprintf(stderr, "cuda_on_host: block %u, thread %d %s (%s:%d)\n", blockIdx.x, current_, what, site.file, site.line);
    abort();
  }

  // The thread_local variables of this module.
  static std::pair<char*, size_t> shared_memory() {
    std::pair<char*, size_t> found{nullptr, 0};
#if !defined(__SANITIZE_ADDRESS__)
    static thread_local char one_of_them;
    found.first = &one_of_them;
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* data) {
          auto& found = *static_cast<std::pair<char*, size_t>*>(data);
          char* const begin = static_cast<char*>(module->dlpi_tls_data);
          for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
            const auto& part = module->dlpi_phdr[i];
            if (part.p_type != PT_TLS || found.first < begin || found.first >= begin + part.p_memsz) continue;
            found = {begin, part.p_memsz};
            return 1;
          }
          return 0;
        },
        &found);
#endif
    return found;
  }

  void start(int i) {
    Thread& t = threads_[i];
    // Six registers and an address to return to. Tops are apart in their pages, or they would share few cache sets.
    void** const top = reinterpret_cast<void**>(t.stack + kStack - i % 32 * 128) - 8;
    top[6] = reinterpret_cast<void*>(enter);
    t.left_at = top;
    t.fake_stack = nullptr;
    ready_.push_back(i);
  }

  void run_block() {
    ready_.clear();
    arrived_ = 0;
    int left = count_;
    for (int i = 0; i < count_; ++i) start(i);
    while (!ready_.empty()) {
      current_ = next();
      threadIdx = {static_cast<unsigned>(current_), 0, 0};
      Thread& t = threads_[current_];
      to_thread(t);
      if (t.state == Thread::done) --left;
      if (t.state == Thread::barrier) arrive(t);
      if (t.state == Thread::warp) release_warp(t);
    }
    if (left == 0) return;
    for (current_ = 0; threads_[current_].state == Thread::done; ++current_);
    fail("waits for threads that never come", threads_[current_].site);
  }

  int next() {
    if (seed_ > 1) std::swap(ready_.back(), ready_[random_() % ready_.size()]);
    const int chosen = seed_ == 0 ? ready_.front() : ready_.back();
    seed_ == 0 ? ready_.pop_front() : ready_.pop_back();
    return chosen;
  }

  void release(int thread) {
    threads_[thread].state = Thread::ready;
    ready_.push_back(thread);
  }

  void arrive(const Thread& t) {
    if (arrived_++ == 0) barrier_ = t.site;
    if (!(t.site == barrier_)) fail("waits at another barrier than others of its block", t.site);
    if (arrived_ < count_) return;
    arrived_ = 0;
    for (int i = 0; i < count_; ++i) release(i);
  }

  void release_warp(const Thread& t) {
    const int first = current_ / kWarp * kWarp;
    uint64_t values[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(t.mask >> lane & 1)) continue;
      if (first + lane >= count_) fail("calls a warp function whose mask names lanes beyond the block", t.site);
      const Thread& other = threads_[first + lane];
      if (other.state == Thread::done) fail("calls a warp function with a lane that has exited", t.site);
      if (other.state != Thread::warp || other.mask != t.mask || !(other.site == t.site)) return;
      values[lane] = other.value;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(t.mask >> lane & 1)) continue;
      Thread& other = threads_[first + lane];
      if (!(t.mask >> other.partner & 1)) fail("reads a lane that is not in the mask", t.site);
      other.value = values[other.partner];
      release(first + lane);
    }
  }

  void wait(Thread::State state, Site site) {
    Thread& t = threads_[current_];
    t.state = state, t.site = site;
    begin_switch(&t.fake_stack, host_stack_, host_size_);
    switch_stacks(&t.left_at, host_);
    end_switch(t.fake_stack);
  }

  void to_thread(Thread& t) {
    void* fake_stack = nullptr;
    begin_switch(&fake_stack, t.stack, kStack);
    switch_stacks(&host_, t.left_at);
    end_switch(fake_stack);
  }

  static void enter();

#if defined(__SANITIZE_ADDRESS__)
  static void begin_switch(void** save, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(save, stack, size);
  }
  static void end_switch(void* saved) { __sanitizer_finish_switch_fiber(saved, nullptr, nullptr); }
#else
  static void begin_switch(void**, const void*, size_t) {}
  static void end_switch(void*) {}
#endif

  uint64_t seed_ = 0;
  std::mt19937_64 random_;
  std::string without_;
  std::mutex mutex_;
  const std::function<void()>* body_ = nullptr;
  std::deque<Thread> threads_;
  std::deque<int> ready_;
  int count_ = 0, current_ = 0, arrived_ = 0;
  Site barrier_{};
  void* host_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_size_ = 0;
};

inline Machine machine;

// Not instrumented: it never returns, so nobody would take the guards off its frame.
__attribute__((no_sanitize("address"))) inline void Machine::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.host_stack_, &machine.host_size_);
#endif
  (*machine.body_)();
  machine.threads_[machine.current_].state = Thread::done;
  begin_switch(nullptr, machine.host_stack_, machine.host_size_);
  switch_stacks(&machine.threads_[machine.current_].left_at, machine.host_);
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a warp exchanges at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::machine.wait_at_barrier({file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace cuda_on_host;
  return from_bits<T>(machine.exchange(mask, to_bits(value), flip, {file, line}));
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  std::tuple<P...> copies{static_cast<P>(arguments)...};
  const bool good = config->dynamicSmemBytes == 0 && cuda_on_host::machine.launch(config->gridDim, config->blockDim,
                                                                                  [&] { std::apply(kernel, copies); });
  return good ? cudaSuccess : cudaErrorInvalidConfiguration;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
