// rows of activations times panels of weights. At few rows the time is that of reading the weights once, so they are
// read in order, several streams per core, and fetched ahead of their use.
#pragma once

#include "tiles.h"

namespace {

// out (R, 16 P) = (if ``first``) or += x (R, units) times P panels of float32. Meanwhile the P panels of ``next`` are fetched,
// pace / 1024 units of each for every unit that is multiplied.
template <int R, int P>
void few_rows(Panels w, int units, const float* x, size_t stride, float* out, size_t width, bool first, Panels next,
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
                sums[r][v] += load((const float*)w.from(v / V, u).at + v % V * WIDTH) * x[r * stride + u];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * V; v++) store(sums[r][v], out + r * width + v * WIDTH);
}

using Kernel = decltype(&few_rows<1, 1>);

// Return few_rows for so many rows and panels, at most R and P.
template <int R = ROWS, int P = STREAMS>
Kernel kernel_of(int rows, int panels) {
    if constexpr (R > 1)
        if (rows < R) return kernel_of<R - 1, P>(rows, panels);
    if constexpr (P > 1)
        if (panels < P) return kernel_of<R, P - 1>(rows, panels);
    return few_rows<R, P>;
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
    if constexpr (IS_TILED<W>) return tiled_product(w, panels, units, x, stride, rows, out, width, next);
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
                kernel_of(block, count)(here, depth * X_UNITS, (const float*)x + row * stride + u * X_UNITS, stride,
                                        out + row * width + p * LANES, width, u == 0,
                                        after.from(0, b * depth / blocks), pace);
            }
        }
    }
}

}  // namespace
