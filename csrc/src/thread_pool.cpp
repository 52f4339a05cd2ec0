#include "thread_pool.hpp"

#ifndef _WIN32  // which has neither forks nor signals to threads, and no OpenMP runtime with GOMP_parallel
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace nextquill {
namespace {

struct Job {
    void (*body)(const void*, std::int64_t, std::int64_t);
    const void* context;
    std::int64_t count, grain;
};

void work(const Job& job, std::atomic<std::int64_t>& next) {
    for (;;) {
        const std::int64_t begin = next.fetch_add(job.grain, std::memory_order_relaxed);
        if (begin >= job.count) return;
        job.body(job.context, begin, std::min(begin + job.grain, job.count));
    }
}

// Never destroyed, as its threads sleep until the process ends.
class Pool {
public:
    // Returns false if another call is using the threads.
    bool run(const Job& job, int helpers) {
        std::unique_lock<std::mutex> in_use(in_use_, std::try_to_lock);
        if (!in_use) return false;
        start_threads(helpers);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            next_.store(0, std::memory_order_relaxed);
            seats_ = helpers;
        }
        for (int i = 0; i < std::min(helpers, started_); ++i) wake_.notify_one();
        work(job, next_);
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;  // a thread that has not woken yet is not needed any more
        idle_.wait(lock, [this] { return working_ == 0; });
        job_ = nullptr;
        return true;
    }

private:
    void start_threads(int wanted) {
        if (started_ >= wanted) return;
#ifndef _WIN32
        // Only the threads that Python knows may receive signals.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
        try {
            for (; started_ < wanted; ++started_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // The system gives no more threads, so the existing ones do the work.
        }
#ifndef _WIN32
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return seats_ > 0; });
            --seats_;
            ++working_;
            const Job& job = *job_;
            lock.unlock();
            work(job, next_);
            lock.lock();
            if (--working_ == 0) idle_.notify_one();
        }
    }

    std::mutex in_use_;
    int started_ = 0;  // guarded by in_use_

    std::mutex mutex_;
    std::condition_variable wake_, idle_;
    const Job* job_ = nullptr;
    int seats_ = 0, working_ = 0;
    std::atomic<std::int64_t> next_{0};
};

std::atomic<Pool*> current_pool{nullptr};

// GCC compiles `#pragma omp parallel` to a call of this function. LLVM's and Intel's runtimes have it as well.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<OpenMPParallel> openmp{nullptr};

struct OpenMPJob {
    const Job& job;
    std::atomic<std::int64_t> next{0};
};

void openmp_body(void* argument) {
    OpenMPJob& shared = *static_cast<OpenMPJob*>(argument);
    work(shared.job, shared.next);
}

#ifndef _WIN32
// A fork copies neither the pool's nor OpenMP's threads, and may copy locked mutexes. So the child uses neither.
void forget_threads() {
    current_pool.store(nullptr);
    openmp.store(nullptr);
}

void watch_forks() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
    static_cast<void>(registered);
}
#else
void watch_forks() {}
#endif

Pool& pool() {
    if (Pool* existing = current_pool.load()) return *existing;
    watch_forks();
    Pool* expected = nullptr;
    Pool* fresh = new Pool;
    if (current_pool.compare_exchange_strong(expected, fresh)) return *fresh;
    delete fresh;
    return *expected;
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  void (*body)(const void*, std::int64_t, std::int64_t), const void* context) {
    const std::int64_t groups = (count + grain - 1) / grain;
    const int helpers = static_cast<int>(std::min<std::int64_t>(threads, groups)) - 1;
    if (helpers <= 0) return body(context, 0, count);
    const Job job{body, context, count, grain};
    if (const OpenMPParallel parallel = openmp.load()) {
        OpenMPJob shared{job};
        parallel(openmp_body, &shared, static_cast<unsigned>(helpers) + 1, 0);
    } else if (!pool().run(job, helpers)) {
        body(context, 0, count);
    }
}

#ifdef _WIN32
bool use_openmp(const char*) { return false; }
#else
bool use_openmp(const char* path) {
    void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return false;
    const auto found = reinterpret_cast<OpenMPParallel>(dlsym(library, "GOMP_parallel"));
    if (found == nullptr) return false;
    watch_forks();
    openmp.store(found);
    return true;
}
#endif

}  // namespace nextquill
