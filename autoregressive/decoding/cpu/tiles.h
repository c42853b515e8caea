// Products by AMX, whose tiles are 16 x 16 units. Without it the same names do nothing and are never called.
// float32 of many rows, where arithmetic is the bound, is multiplied as ``split``: faster than by float32 instructions
// (1.3 times at 64 rows), and as precise.
#pragma once

#include "vectors.h"
#ifdef AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef AMX
// Ask the system for the right to use AMX, once and before anything else.
bool allow_tiles() { return syscall(SYS_arch_prctl, /* ARCH_REQ_XCOMP_PERM */ 0x1023, /* tile data */ 18) == 0; }

void configure_tiles() {
    struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::"r"(&config) : "memory");  // or the compiler may drop what the intrinsic does not say it reads
    _tile_loadconfig(&config);
}

// Tiles are 16 x 16 units: the sums of 16 M rows and P panels, M P <= 4, in 0-3 (P of them for each 16 rows), x in 4
// and, if M is 2, in 5, weights in 6-7.
void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

template <int M, int P>
void store_sums(float* to, size_t width) {
    _tile_stored(0, to, 4 * width);
    if constexpr (P >= 2) _tile_stored(1, to + LANES, 4 * width);
    if constexpr (M == 2) _tile_stored(2, to + 16 * width, 4 * width);
    if constexpr (M == 2 && P == 2) _tile_stored(3, to + 16 * width + LANES, 4 * width);
    if constexpr (P == 4) _tile_stored(2, to + 2 * LANES, 4 * width);
    if constexpr (P == 4) _tile_stored(3, to + 3 * LANES, 4 * width);
}

void load_sums(const float* from) {
    _tile_loadd(0, from, 8 * LANES);
    _tile_loadd(1, from + LANES, 8 * LANES);
    _tile_loadd(2, from + 32 * LANES, 8 * LANES);
    _tile_loadd(3, from + 33 * LANES, 8 * LANES);
}

template <int M>
void load_rows(const uint32_t* x, size_t stride) {
    _tile_loadd(4, x, 4 * stride);
    if constexpr (M == 2) _tile_loadd(5, x + 16 * stride, 4 * stride);
}

// sums += the rows times 16 units of P panels; one or two panels that were the last before are not loaded ``again``
template <int M, int P>
void multiply_tiles(Panels w, bool again = true) {
    if (again || P > 2) _tile_loadd(6, w.at, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (M == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (P >= 2) {
        if (again || P > 2) _tile_loadd(7, w.from(1).at, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (M == 2) _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (P == 4) {
        _tile_loadd(6, w.from(2).at, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, w.from(3).at, 64);
        _tile_dpbf16ps(3, 4, 7);
    }
}

// out (16 M, 16 P) = x (16 M, units) times P panels
template <int M, int P>
void tiles(Panels w, int units, const uint32_t* x, size_t stride, float* out, size_t width, Panels next) {
    zero_sums();
    const int ahead = std::min(FETCH_AHEAD, units);
    for (int u = 0; u < units; u += 16) {
        const Panels fetch = u + ahead < units ? w.from(0, u + ahead) : next.from(0, u + ahead - units);
        for (int p = 0; p < P; p++)
            for (int l = 0; l < 16; l++) __builtin_prefetch(fetch.from(p, l).at);
        load_rows<M>(x + u, stride);
        multiply_tiles<M, P>(w.from(0, u));
    }
    store_sums<M, P>(out, width);
}

// ``product`` by tiles, two panels or, at 16 rows, four at a time
void tiled_product(Panels w, int panels, int units, const uint32_t* x, size_t stride, int rows, float* out,
                   size_t width, Panels next) {
    for (int p = 0, some; p < panels; p += some) {
        const int left = panels - p;
        some = rows == 16 && left >= 4 ? 4 : std::min(left, 2);
        const Panels now = w.from(p), then = left > some ? w.from(p + some) : next;
        const auto two = some == 2 ? tiles<2, 2> : tiles<2, 1>;
        const auto one = some == 4 ? tiles<1, 4> : some == 2 ? tiles<1, 2> : tiles<1, 1>;
        for (int r = 0; r < rows; r += 32)
            (rows - r >= 32 ? two : one)(now, units, x + r * stride, stride, out + r * width + p * LANES, width, then);
    }
}

// Two panels in parts: for each DEPTH units the first bfloat16 of both, then the second, then the third
constexpr int PART = 2 * DEPTH / 2 * LANES;  // units
constexpr int TILE_STRETCH = 256;            // units that are split at a time

// units 2 i and 2 i + 1 of two panels in parts: the upper 16 bits, those of what is left, the rest
void split_pair(Panels w, int i, uint32_t* parts) {
    parts += i / 16 * 3 * PART + i % 16 * LANES;
    for (int p = 0; p < 2; p++, parts += 16 * LANES) {
        uvec a = *(const uvec*)w.from(p, 2 * i).at, b = *(const uvec*)w.from(p, 2 * i + 1).at;
        for (int j = 0; j < 3; j++) {
            const uvec upper_a = a & 0xffff0000, upper_b = b & 0xffff0000;
            *(uvec*)(parts + j * PART) = a >> 16 | upper_b;
            a = (uvec)((vec)a - (vec)upper_a);
            b = (uvec)((vec)b - (vec)upper_b);
        }
    }
}

// sums += x (32, units) times two panels in parts, of their nine products the six that count in float32; between them
// ``meanwhile`` is called, 6 times for each DEPTH units
template <class F>
void multiply_split(const uint32_t* x, size_t stride, size_t part, const uint32_t* w, int units, F meanwhile) {
    constexpr int of_x[] = {2, 0, 0, 0, 1, 1}, of_w[] = {0, 0, 2, 1, 1, 0};  // each step changes one of the two
    for (int u = 0; u < units; u += DEPTH, x += DEPTH / 2, w += 3 * PART)
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
            if (i == 0 || of_x[i] != of_x[i - 1]) load_rows<2>(x + of_x[i] * part, stride);
            multiply_tiles<2, 2>({w + of_w[i] * PART, 16 * LANES}, i == 0 || of_w[i] != of_w[i - 1]);
            meanwhile();
        }
}

// out (rows, 32) = x (rows, units) times two panels, so many pairs of panels in turn; done(pair) takes it. While a
// stretch of a pair is multiplied the next is split, and what comes after it fetched. Rows are a multiple of 32.
template <class F>
void split_product(Panels w, int pairs, int units, const uint32_t* x, size_t stride, int rows, float* out, F done) {
    alignas(64) static thread_local uint32_t parts[2][3 * PART * TILE_STRETCH / DEPTH];
    uint32_t *now = parts[0], *later = parts[1];
    const int ahead = std::min(FETCH_AHEAD, units);
    for (int i = 0; i < std::min(TILE_STRETCH, units) / 2; i++) split_pair(w, i, now);
    for (int pair = 0; pair < pairs; pair++, w = w.from(2)) {
        for (int u = 0, depth; u < units; u += depth, std::swap(now, later)) {
            depth = std::min(TILE_STRETCH, units - u);
            const bool last = u + depth == units;
            const Panels next = last ? w.from(2) : w;
            const int begin = last ? 0 : u + depth;
            const int count = last && pair + 1 == pairs ? 0 : std::min(TILE_STRETCH, units - begin) / 2;
            const int pace = ceil_div(1024 * count, rows / 32 * depth / DEPTH * 6);
            int i = 0, due = 0;
            const auto split_some = [&] {
                for (due += pace; i < std::min(count, due / 1024); i++) {
                    const int at = begin + 2 * i + ahead;
                    const Panels fetch = at < units ? next.from(0, at) : next.from(2, at - units);
                    for (int p = 0; p < 2; p++) {
                        __builtin_prefetch(fetch.from(p, 0).at);
                        __builtin_prefetch(fetch.from(p, 1).at);
                    }
                    split_pair(next.from(0, begin), i, later);
                }
            };
            for (int r = 0; r < rows; r += 32) {
                float* sums = out + r * 2 * LANES;
                u == 0 ? zero_sums() : load_sums(sums);
                multiply_split(x + r * stride + u / 2, stride, units / 2, now, depth, split_some);
                store_sums<2, 2>(sums, 2 * LANES);
            }
        }
        done(pair);
    }
}

void release_tiles() { _tile_release(); }
#else
bool allow_tiles() { return false; }
void configure_tiles() {}
void release_tiles() {}
void tiled_product(Panels, int, int, const uint32_t*, size_t, int, float*, size_t, Panels) {}
template <class F>
void split_product(Panels, int, int, const uint32_t*, size_t, int, float*, F) {}
#endif

}  // namespace
