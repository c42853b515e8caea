// Arithmetic on one register of floats, whatever its width, by the vector extensions of GCC and Clang.
#pragma once

#include <cstring>

#include "layout.h"
#ifdef __AMX_BF16__
#define AMX
#include <immintrin.h>
#endif

namespace {

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint64_t pairs __attribute__((vector_size(4 * WIDTH), aligned(4)));

vec load(const float* x) { return *(const vec*)x; }
void store(vec x, float* to) { *(vec*)to = x; }

float total(vec x) {
    float sum = 0;
    for (int l = 0; l < WIDTH; l++) sum += x[l];
    return sum;
}

// float32 to the nearest bfloat16, of two equally near ones the even
void store(vec x, stored_bf16* to) {
    const uvec bits = (uvec)x;
    const uvec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    for (int l = 0; l < WIDTH; l++) to[l].bits = rounded[l];
}

#ifdef AMX
void store(vec x, tile_bf16* to) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#endif

// Copy ``count`` elements; the counts of a hot path without a loop or a call.
template <class T>
void copy(const T* from, T* to, int count) {
    if (count == WIDTH)
        memcpy(to, from, sizeof(T) * WIDTH);
    else if (count == WIDTH / 2)
        memcpy(to, from, sizeof(T) * WIDTH / 2);
    else
        for (int l = 0; l < count; l++) to[l] = from[l];
}

// The first ``count`` of x become elements ``at``, ``at`` + 1, ... of a row of activations of ``inputs`` elements.
void put(vec x, float* row, int, int at, int count) { copy((float*)&x, row + at, count); }
#ifdef AMX
void put(vec x, tile_bf16* row, int, int at, int count) {
    tile_bf16 nearest[WIDTH];
    store(x, nearest);
    copy(nearest, row + at, count);
}

void put(vec x, split* row, int inputs, int at, int count) {
    for (int i = 0; i < 3; i++, at += round_up(inputs, DEPTH)) {
        tile_bf16 nearest[WIDTH];
        store(x, nearest);
        copy(nearest, (tile_bf16*)row + at, count);
        x -= (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i*)nearest)), 16);
    }
}
#endif

// e^x to a relative error of 2e-7; 0 below -87
vec exponential(vec x) {
    const ivec vanishes = x < -87.0f;
    x = vanishes ? vec{} : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const ivec n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? vec{} - 0.5f : vec{} + 0.5f), ivec);
    const vec k = __builtin_convertvector(n, vec);
    const vec r = x - k * 0.693359375f + k * 2.12194440e-4f;  // x - k log 2, with log 2 in two parts
    vec y = 1.0f / 120 + r * (1.0f / 720);
    y = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * y))));
    return vanishes ? vec{} : y * (vec)((n + 127) << 23);
}

// Channels in pairs (a, b) -> (a cos - b sin, b cos + a sin). ``turn`` holds cos, cos, ... for all channels of a head,
// then -sin, sin, ...
vec rotate(const float* x, const float* turn, int channels) {
    const vec v = load(x);
    const vec swapped = (vec)((pairs)v >> 32 | (pairs)v << 32);
    return v * load(turn) + swapped * load(turn + channels);
}

}  // namespace
