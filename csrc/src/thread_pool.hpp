// Rows of a call, shared among threads.
#pragma once

#include <cstdint>

namespace nextquill {

// Runs body(context, begin, end) over all of [0, count), in groups of `grain`, on at most `threads` threads, of which
// the calling thread is one. The groups go to whoever is free.
//
// Threads are kept between calls: waking one costs less than starting one. A forked child has none of its parent's
// and starts its own. While one call uses them, another (from a second Python thread) runs on its own thread alone.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  void (*body)(const void* context, std::int64_t begin, std::int64_t end), const void* context);

}  // namespace nextquill
