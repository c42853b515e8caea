// How weights, keys, values and activations lie in memory, and how wide the processor's registers are.
//
// A matrix (outputs, inputs) is cut into panels of 16 outputs. A panel is a column of units, and a unit holds 4 bytes
// for each of its 16 outputs: one float32, or two bfloat16 that are neighbours along the inputs. Products add up over
// the inputs, so a panel is read from top to bottom, one cache line after the other.
//
//            panel of float32                    panel of bfloat16
//   unit 0   w[0][0] w[1][0] ... w[15][0]        w[0][0:2] w[1][0:2] ... w[15][0:2]       64 bytes, a cache line
//   unit 1   w[0][1] w[1][1] ... w[15][1]        w[0][2:4] w[1][2:4] ... w[15][2:4]
//   ...      inputs padded with zeros to a multiple of DEPTH; then the panel of outputs 16 to 31
//
// The cache of one key-value head is two such matrices: keys (slots, channels), then values (channels, slots).
// Activations are rows of elements, one row per image and slot; row_units() is the distance from one to the next.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

constexpr int LANES = 16;        // outputs in a panel
constexpr int DEPTH = 32;        // inputs are padded to a multiple of this
constexpr int ROW_BLOCK = 64;    // rows that are multiplied by a panel before the next panel
constexpr int STRETCH = 128;     // inputs of a panel that stay in the first-level cache until all rows are multiplied
constexpr int FETCH_AHEAD = 64;  // units, by tiles

// WIDTH: floats in a register.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

// Types of weights, keys and values. float: float32 in memory and in arithmetic.
struct stored_bf16 {  // bfloat16 in memory, float32 in arithmetic
    uint16_t bits;
};
struct tile_bf16 {  // bfloat16 in memory, multiplied by AMX
    uint16_t bits;
};
struct split {  // float32 in memory, multiplied by AMX as the sum of three bfloat16
    float whole;
};

template <class W>
constexpr bool IS_STORED = std::is_same_v<W, stored_bf16>;
template <class W>
constexpr bool IS_TILED = std::is_same_v<W, tile_bf16>;
template <class W>
constexpr bool IS_SPLIT = std::is_same_v<W, split>;
template <class W>
constexpr int PER_UNIT = 4 / sizeof(W);  // elements in a unit

// What activations are kept as. A row for ``split`` holds the first bfloat16 of all its elements, then the second ones,
// then the third ones.
template <class W>
using Factor = std::conditional_t<IS_STORED<W>, float, W>;
// What the cache is kept as.
template <class W>
using Cached = std::conditional_t<IS_SPLIT<W>, float, W>;

struct Panels {
    const uint32_t* at;
    size_t stride;  // units from one panel to the next, times LANES

    Panels from(int panel, int unit = 0) const { return {at + panel * stride + (size_t)unit * LANES, stride}; }
};

constexpr int ceil_div(int x, int y) { return (x + y - 1) / y; }
constexpr int round_up(int x, int to) { return ceil_div(x, to) * to; }

// Units in a panel with so many inputs.
template <class W>
int units_of(int inputs) {
    return round_up(inputs, DEPTH) / PER_UNIT<W>;
}

// 4-byte units from a row of activations to the next: an odd number of cache lines, so that 16 rows fall into as many
// sets of the first-level cache.
template <class W>
int row_units(int inputs) {
    const int elements = round_up(inputs, DEPTH);
    return (IS_SPLIT<W> ? elements / 2 * 3 : elements * (int)sizeof(Factor<W>) / 4) | LANES;
}

struct alignas(64) Line {
    uint32_t units[LANES];
};

// Memory that begins with a cache line and only grows; zeros at first.
template <class T>
class Buffer {
  public:
    void reserve(size_t size) { lines.resize(std::max(lines.size(), (size * sizeof(T) + 63) / 64)); }
    T& operator[](size_t i) { return ((T*)lines.data())[i]; }

  private:
    std::vector<Line> lines;
};

}  // namespace
