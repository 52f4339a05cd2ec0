// Shares the rows of a call among threads.
#pragma once

#include <cstdint>

namespace nextquill {

// Runs body(context, begin, end) over all of [0, count), in groups of `grain`, on at most `threads` threads, including
// the calling thread. Each free thread takes the next group.
//
// Threads are kept between calls, as waking one costs less than starting one. They belong to the OpenMP runtime given
// to `use_openmp`, or to a pool of our own. A forked child has no threads of its parent, so it starts a new pool. While
// one call uses the pool, a second call, from another Python thread, runs on its own thread alone.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  void (*body)(const void* context, std::int64_t begin, std::int64_t end), const void* context);

// Uses the threads of the OpenMP runtime already loaded from `path`. Returns false if none is loaded, or if it lacks
// GOMP_parallel.
//
// After a parallel region, OpenMP's threads wait actively for about a millisecond, and threads of our own would have to
// share their cores: with two threads on two cores, the kernels took 1.4 times as long right after a matrix product.
bool use_openmp(const char* path);

}  // namespace nextquill
