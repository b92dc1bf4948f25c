// One pool of threads for all kernels.
//
// A parallel call is a number of items that threads claim one by one; the caller claims them too. It ends when all
// items are done, not when all threads have arrived, so that a thread which the machine has no time for costs nothing:
// on a busy machine the caller does the work alone.
#pragma once

#include <cstdint>

namespace dsv2 {

// Replace the pool: `count` threads with the caller; thread i > 0 is pinned to cpus[i] unless `cpus` is null.
void set_threads(int count, const int32_t* cpus);

// Call fn(context, item) for every item in [0, items); returns when all are done. Calls from several threads take turns.
void run(int64_t items, void (*fn)(const void*, int64_t), const void* context);

template <class F>
void parallel(int64_t items, const F& fn) {
    run(items, [](const void* context, int64_t item) { (*static_cast<const F*>(context))(item); }, &fn);
}

}  // namespace dsv2
