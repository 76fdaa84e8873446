// A pool of threads shared by all kernels.
//
// Not OpenMP: torch carries its own OpenMP runtime, and a second one would compete with it for the cores.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace vamoh {

class ThreadPool {
 public:
  // The pool of this process. After a fork the child gets a new one: the parent's threads do not exist there and its
  // locks may be held for ever, so the old pool is left alone.
  static ThreadPool& get() {
    static std::atomic<ThreadPool*> current{nullptr};
    ThreadPool* pool = current.load();
    while (pool == nullptr || pool->process_ != getpid()) {
      auto* fresh = new ThreadPool;
      if (current.compare_exchange_strong(pool, fresh)) return *fresh;
      delete fresh;
    }
    return *pool;
  }

  // Calls task(i, worker) for every i in [0, tasks) and returns when all are done. worker is in [0, threads) and no
  // two calls running at once have the same. Tasks must not throw. While another call holds the pool, or where no
  // thread can be made, the calling thread does the work.
  void run(int64_t tasks, int threads, const std::function<void(int64_t, int)>& task) {
    const int wanted = static_cast<int>(std::min<int64_t>(threads, tasks));
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (wanted <= 1 || !turn.try_lock()) {
      for (int64_t i = 0; i < tasks; ++i) task(i, 0);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; size_ < wanted - 1; ++size_) std::thread(&ThreadPool::serve, this).detach();
      } catch (const std::system_error&) {
      }
      task_ = &task;
      tasks_ = tasks;
      next_ = 0;
      seats_ = wanted - 1;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work(int worker) {
    for (int64_t i; (i = next_.fetch_add(1)) < tasks_;) (*task_)(i, worker);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      const int worker = seats_--;
      ++busy_;
      lock.unlock();
      work(worker);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const pid_t process_ = getpid();
  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t, int)>* task_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
  int size_ = 0;   // threads made
  int seats_ = 0;  // threads that may still join the current call
  int busy_ = 0;   // threads at work
};

}  // namespace vamoh
