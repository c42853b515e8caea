// rows of activations times panels of weights. At few rows the time is that of reading the weights once, so they are
// read in order, several streams per core, and fetched ahead of their use.
#pragma once

#include "tiles.h"

namespace {

// sums + w * x: a register of a unit of weights, times the same unit of one row
vec multiply_add(vec sums, const uint32_t* w, const uint32_t* x, float*) {
    float factor;
    memcpy(&factor, x, 4);
    return sums + *(const vec*)w * factor;
}

#ifdef __AVX512BF16__
vec multiply_add(vec sums, const uint32_t* w, const uint32_t* x, bf16*) {
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(*x));
}
#endif

// out (R, 16 P) = (if ``first``) or += x (R, units) times P panels. Meanwhile the P panels of ``next`` are fetched,
// pace / 1024 units of each for every unit that is multiplied.
template <class W, int R, int P>
void few_rows(Panels w, int units, const uint32_t* x, size_t stride, float* out, size_t width, bool first, Panels next,
              int pace) {
    constexpr int V = LANES / WIDTH;  // registers of a unit
    vec sums[R][P * V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * V; v++) sums[r][v] = first ? vec{} : load(out + r * width + v * WIDTH);
    for (int u = 0; u < units; u++) {
        for (int p = 0; p < P; p++) __builtin_prefetch(next.from(p, u * pace / 1024).at);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < P * V; v++)
                sums[r][v] = multiply_add(sums[r][v], w.from(v / V, u).at + v % V * WIDTH, x + r * stride + u,
                                          (W*)nullptr);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * V; v++) store(sums[r][v], out + r * width + v * WIDTH);
}

template <class W>
using Kernel = decltype(&few_rows<W, 1, 1>);

// few_rows for so many rows and panels, at most R and STREAMS
template <class W, int P, int R = ROWS>
Kernel<W> kernel_of_rows(int rows) {
    if constexpr (R == 1)
        return few_rows<W, 1, P>;
    else
        return rows == R ? few_rows<W, R, P> : kernel_of_rows<W, P, R - 1>(rows);
}

template <class W, int P = STREAMS>
Kernel<W> kernel_of(int rows, int panels) {
    if constexpr (P == 1)
        return kernel_of_rows<W, 1>(rows);
    else
        return panels == P ? kernel_of_rows<W, P>(rows) : kernel_of<W, P - 1>(rows, panels);
}

// So many units of bfloat16 panels as panels of float32, in memory that stays in the core's first-level cache
Panels unpack(Panels w, int panels, int units) {
    alignas(64) static thread_local uint32_t unpacked[STREAMS * 2 * FETCH_AHEAD * LANES];
    const size_t stride = 2 * FETCH_AHEAD * LANES;
    for (int p = 0; p < panels; p++)
        for (int u = 0; u < units; u++)
            for (int l = 0; l < LANES; l += WIDTH) {
                const uvec both = *(const uvec*)(w.from(p, u).at + l);
                uint32_t* to = unpacked + p * stride + 2 * u * LANES + l;
                *(uvec*)to = both << 16;
                *(uvec*)(to + LANES) = both & 0xffff0000;
            }
    return {unpacked, stride};
}

// out (rows, 16 panels) = x (rows, units) times the panels, while the first units of ``next`` are fetched. Without
// tiles a stretch of up to STREAMS panels stays in the first-level cache until all rows have been multiplied by it.
template <class W>
void product(Panels w, int panels, int units, const uint32_t* x, size_t stride, int rows, float* out, size_t width,
             Panels next) {
    if (sizeof(W) == 2 && tiled) return tiled_product(w, panels, units, x, stride, rows, out, width, next);
    constexpr int X_UNITS = sizeof(Factor<W>) / sizeof(W);  // units of x for one of w
    const int blocks = ceil_div(rows, ROWS), pace = 1024 / (blocks * X_UNITS);
    for (int p = 0, count; p < panels; p += count) {
        const int left = panels - p;
        count = left == 4 ? std::min(2, STREAMS) : std::min(left, STREAMS);
        for (int u = 0; u < units; u += FETCH_AHEAD) {
            const int depth = std::min(FETCH_AHEAD, units - u);
            const Panels after = u + depth < units ? w.from(p, u + depth) : left > count ? w.from(p + count) : next;
            Panels here = w.from(p, u);
            if constexpr (IS_STORED<W>) here = unpack(here, count, depth);
            for (int b = 0; b < blocks; b++) {
                const int row = rows * b / blocks, block = rows * (b + 1) / blocks - row;
                kernel_of<Factor<W>>(block, count)(here, depth * X_UNITS, x + row * stride + u * X_UNITS, stride,
                                                   out + row * width + p * LANES, width, u == 0,
                                                   after.from(0, b * depth / blocks), pace);
            }
        }
    }
}

}  // namespace
