// Helpers of the kernels that work row by row.
#pragma once

#include "pool.hpp"

namespace dsv2 {

// Number of rows from which on the thread pool pays off.
constexpr int64_t ROWS_TO_SHARE = 32;

template <class F>
void each_row(int64_t rows, const F& fn) {
    if (rows < ROWS_TO_SHARE) {
        for (int64_t row = 0; row < rows; row++) fn(row);
    } else {
        parallel(rows, fn);
    }
}

// Rotate the pairs (x[2i], x[2i + 1]) as complex numbers by cos + i·sin; calls put(index, value).
template <class Put>
inline void rotate(const float* x, const float* rotation, int64_t size, const Put& put) {
    for (int64_t i = 0; i < size; i += 2) {
        const float a = x[i], b = x[i + 1], c = rotation[i], s = rotation[i + 1];
        put(i, a * c - b * s);
        put(i + 1, a * s + b * c);
    }
}

}  // namespace dsv2
