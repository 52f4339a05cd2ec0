// Rows of a call, shared among threads.
#pragma once

#include <cstdint>

namespace nextquill {

// Runs body(context, begin, end) over all of [0, count), in groups of `grain`, on at most `threads` threads, of which
// the calling thread is one. The groups go to whoever is free.
//
// Threads are kept between calls: waking one costs less than starting one. They are those of the OpenMP runtime given to
// `use_openmp`, else a pool of our own. A forked child has none of its parent's and starts a pool. While one call uses
// the pool, another (from a second Python thread) runs on its own thread alone.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  void (*body)(const void* context, std::int64_t begin, std::int64_t end), const void* context);

// Share the threads of the OpenMP runtime that is already loaded from `path`; false if it is not, or is another kind.
//
// After a parallel region its threads wait for the next one actively, for about a millisecond. Ours would have to share
// their cores meanwhile: with two threads on two cores the kernels took 1.4 times as long right after a matrix product.
bool use_openmp(const char* path);

}  // namespace nextquill
