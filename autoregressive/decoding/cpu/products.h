// rows of activations times panels of weights. At few rows the time is that of reading the weights once, so they are
// read in order, several streams per core, and fetched ahead of their use.
#pragma once

#include "tiles.h"

namespace {

// A product keeps rows x panels x 16 sums in registers, as many as leave room for the weights and a factor.
template <class W>
struct Block {
#if defined(__AVX512F__)
    static constexpr int rows = 8, panels = 3;  // 24 of 32 registers
#elif defined(__AVX2__)
    static constexpr int rows = IS_STORED<W> ? 4 : 3, panels = IS_STORED<W> ? 1 : 2;  // 8 or 12 of 16
#else
    static constexpr int rows = 4, panels = 1;  // 16 of 32
#endif
};

// A register of the weights of input i in a unit
vec weights(const uint32_t* w, int, float*) { return *(const vec*)w; }
vec weights(const uint32_t* w, int i, stored_bf16*) {
    const uvec both = *(const uvec*)w;
    return (vec)(i == 0 ? both << 16 : both & 0xffff0000);
}

// out (R, 16 P) = (if ``first``) or += x (R, inputs) times so many units of P panels. Meanwhile the P panels of
// ``next`` are fetched, pace / 1024 units of each for every unit that is multiplied.
template <class W, int R, int P>
void few_rows(Panels w, int units, const float* x, size_t stride, float* out, size_t width, bool first, Panels next,
              int pace) {
    constexpr int V = LANES / WIDTH;  // registers of a unit
    vec sums[R][P * V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * V; v++) sums[r][v] = first ? vec{} : load(out + r * width + v * WIDTH);
    for (int u = 0; u < units; u++) {
        for (int p = 0; p < P; p++) __builtin_prefetch(next.from(p, u * pace / 1024).at, 0, 2);
#pragma GCC unroll 2
        for (int i = 0; i < PER_UNIT<W>; i++) {
            vec factors[P * V];
#pragma GCC unroll 8
            for (int v = 0; v < P * V; v++) factors[v] = weights(w.from(v / V, u).at + v % V * WIDTH, i, (W*)nullptr);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int v = 0; v < P * V; v++) sums[r][v] += factors[v] * x[r * stride + u * PER_UNIT<W> + i];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * V; v++) store(sums[r][v], out + r * width + v * WIDTH);
}

using Kernel = decltype(&few_rows<float, 1, 1>);

// Return few_rows for so many rows and panels, at most R and P.
template <class W, int R = Block<W>::rows, int P = Block<W>::panels>
Kernel kernel_of(int rows, int panels) {
    if constexpr (R > 1)
        if (rows < R) return kernel_of<W, R - 1, P>(rows, panels);
    if constexpr (P > 1)
        if (panels < P) return kernel_of<W, R, P - 1>(rows, panels);
    return few_rows<W, R, P>;
}

// Return so many units of bfloat16 panels as panels of float32, in memory that stays in the first-level cache.
Panels unpack(Panels w, int panels, int units) {
    const size_t stride = STRETCH * LANES;
    alignas(64) static thread_local uint32_t unpacked[Block<float>::panels * STRETCH * LANES];
    for (int p = 0; p < panels; p++)
        for (int u = 0; u < units; u++)
            for (int l = 0; l < 2 * LANES; l += WIDTH)
                *(vec*)(unpacked + p * stride + 2 * u * LANES + l) =
                    weights(w.from(p, u).at + l % LANES, l / LANES, (stored_bf16*)nullptr);
    return {unpacked, stride};
}

// product, of weights kept as W by few_rows of weights K
template <class W, class K>
void blocked_product(Panels w, int panels, int units, const float* x, size_t stride, int rows, float* out, size_t width,
                     Panels next) {
    constexpr int RATIO = sizeof(K) / sizeof(W);  // units of K for one of W
    constexpr int UNITS = STRETCH / PER_UNIT<W>;
    const int blocks = ceil_div(rows, Block<K>::rows), pace = 1024 / (blocks * RATIO);
    for (int p = 0, count; p < panels; p += count) {
        const int left = panels - p;
        count = std::min(left == 4 ? 2 : left, Block<K>::panels);
        for (int u = 0; u < units; u += UNITS) {
            const int depth = std::min(UNITS, units - u);
            const Panels after = u + depth < units ? w.from(p, u + depth) : left > count ? w.from(p + count) : next;
            Panels here = w.from(p, u);
            if constexpr (RATIO == 2) here = unpack(here, count, depth);
            for (int b = 0; b < blocks; b++) {
                const int row = rows * b / blocks, block = rows * (b + 1) / blocks - row;
                kernel_of<K>(block, count)(here, depth * RATIO, x + row * stride + u * PER_UNIT<W>, stride,
                                           out + row * width + p * LANES, width, u == 0,
                                           after.from(0, b * depth / blocks), pace);
            }
        }
    }
}

// out (rows, 16 panels) = x (rows, inputs) times so many units of the panels, while the first units of ``next`` are
// fetched. bfloat16 that is only stored is unpacked once for many rows, but in registers if they fit two blocks.
template <class W>
void product(Panels w, int panels, int units, const uint32_t* x, size_t stride, int rows, float* out, size_t width,
             Panels next) {
    if constexpr (IS_TILED<W>)
        tiled_product(w, panels, units, x, stride, rows, out, width, next);
    else if (IS_STORED<W> && rows > 2 * Block<W>::rows)
        blocked_product<W, float>(w, panels, units, (const float*)x, stride, rows, out, width, next);
    else
        blocked_product<W, W>(w, panels, units, (const float*)x, stride, rows, out, width, next);
}

}  // namespace
