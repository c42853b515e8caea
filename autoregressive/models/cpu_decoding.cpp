// One decoding step of the GPT on a CPU: at few rows its time is that of reading the weights and the cache once, so
// they are laid out to be read in order, in several streams a core, and fetched ahead of their use.
// Built, called and fed by cpu_decoding.py.
//
// Memory is counted in units of 4 bytes: one float32, or two neighbouring bfloat16 along the axis a product sums over.
// A matrix is cut into panels of 16 outputs, each (units, 16) in memory. The cache holds what attention multiplies by
// in the same form: keys as panels of 16 slots, values as panels of 16 channels. Sums, the residual stream and the
// softmax are float32. A row's result depends neither on other rows nor on the number of threads.
// float32 of many rows, where arithmetic is the bound, is multiplied by bfloat16 tiles as ``split``: faster than by
// float32 instructions (1.3 times at 64 rows), and as precise.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#ifdef __AMX_BF16__
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

struct Layer {
    const uint32_t *wqkv, *wo, *w13, *w2;  // panels; w13 has 8 outputs of w1, then the same 8 of w3, in each
    const float *attention_norm, *ffn_norm;
};

struct Model {
    const Layer* layers;
    const float *norm, *rotary;  // rotary: (slots, 2, channels), see rotate
    const uint32_t* head;        // panels
    int32_t n_layer, dim, n_head, kv_heads, head_dim, ffn_dim, vocab_size, slots;
    float eps;
};

struct Cache {
    uint32_t* at;
    int64_t layer_stride, row_stride, head_stride;  // units
};

namespace {

constexpr int LANES = 16;        // outputs in a panel
constexpr int DEPTH = 32;        // elements that a product sums over come in multiples of this
constexpr int ROW_BLOCK = 64;    // rows that a panel is applied to before the next
constexpr int FETCH_AHEAD = 64;  // units
#ifdef __AVX512F__
constexpr int ROWS = 8, STREAMS = 3;  // of the kernel without tiles: 24 sums, 3 weights and a factor in 32 registers
#else
constexpr int ROWS = 4, STREAMS = 1;
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4)));

struct bf16 {
    uint16_t bits;
};

// float32 that tiles multiply as the sum of three bfloat16; a row of x holds the first of all its elements, then the
// second, then the third
struct split {
    float whole;
};

template <class W>
constexpr bool SPLIT = std::is_same_v<W, split>;
template <class W>
constexpr int PER = 4 / sizeof(W);  // elements in a unit

struct Panels {
    const uint32_t* at;
    size_t stride;  // from one panel to the next

    Panels from(int panel, int unit = 0) const { return {at + panel * stride + (size_t)unit * LANES, stride}; }
};

int ceil_div(int x, int y) { return (x + y - 1) / y; }
int round_up(int x, int to) { return ceil_div(x, to) * to; }

template <class W>
int units_of(int elements) {
    return round_up(elements, DEPTH) / PER<W>;
}

// units from a row of x to the next: an odd number of cache lines, so that 16 rows are in as many sets of the cache
template <class W>
int row_units(int elements) {
    return (SPLIT<W> ? round_up(elements, DEPTH) / 2 * 3 : units_of<W>(elements)) | LANES;
}

vec load(const float* x) { return *(const vec*)x; }
void store(vec x, float* to) { *(vec*)to = x; }
float total(vec x) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += x[l];
    return sum;
}

// sums + w * x: a unit of each of 16 outputs, times a unit of one row
vec multiply_add(vec sums, const uint32_t* w, const uint32_t* x, float*) {
    float factor;
    memcpy(&factor, x, 4);
    return sums + *(const vec*)w * factor;
}

#ifdef __AVX512BF16__
vec multiply_add(vec sums, const uint32_t* w, const uint32_t* x, bf16*) {
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(*x));
}
void store(vec x, bf16* to) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#endif

// out (ROWS, 16 P) = or += x (ROWS, units) times P panels; meanwhile 1024 / pace units of each panel of ``next`` come
template <class W, int P>
void few_rows(Panels w, int units, const uint32_t* x, size_t stride, float* out, size_t width, bool first, Panels next,
              int pace) {
    vec sums[ROWS][P];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < P; p++) sums[r][p] = first ? vec{} : load(out + r * width + p * LANES);
    for (int u = 0; u < units; u++) {
        for (int p = 0; p < P; p++) __builtin_prefetch(next.from(p, u * pace / 1024).at);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
                sums[r][p] = multiply_add(sums[r][p], w.from(p, u).at, x + r * stride + u, (W*)nullptr);
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < P; p++) store(sums[r][p], out + r * width + p * LANES);
}

bool tiled = false;  // bfloat16 products go through AMX

#ifdef AMX
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
constexpr int STRETCH = 256;                 // units that are split at a time

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
    alignas(64) static thread_local uint32_t parts[2][3 * PART * STRETCH / DEPTH];
    uint32_t *now = parts[0], *later = parts[1];
    const int ahead = std::min(FETCH_AHEAD, units);
    for (int i = 0; i < std::min(STRETCH, units) / 2; i++) split_pair(w, i, now);
    for (int pair = 0; pair < pairs; pair++, w = w.from(2)) {
        for (int u = 0, depth; u < units; u += depth, std::swap(now, later)) {
            depth = std::min(STRETCH, units - u);
            const bool last = u + depth == units;
            const Panels next = last ? w.from(2) : w;
            const int begin = last ? 0 : u + depth;
            const int count = last && pair + 1 == pairs ? 0 : std::min(STRETCH, units - begin) / 2;
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
#else
void configure_tiles() {}
void tiled_product(Panels, int, int, const uint32_t*, size_t, int, float*, size_t, Panels) {}
template <class F>
void split_product(Panels, int, int, const uint32_t*, size_t, int, float*, F) {}
#endif

// out (rows, 16 panels) = x (rows, units) times the panels, while the first of ``next`` come into the core's cache.
// Without tiles a stretch of the panels stays in its first level for all rows.
template <class W>
void product(Panels w, int panels, int units, const uint32_t* x, size_t stride, int rows, float* out, size_t width,
             Panels next) {
    if (sizeof(W) == 2 && tiled) return tiled_product(w, panels, units, x, stride, rows, out, width, next);
    const int blocks = rows / ROWS, pace = 1024 / blocks;
    for (int p = 0, some; p < panels; p += some) {
        const int left = panels - p;
        some = left == 4 ? 2 : left >= STREAMS ? STREAMS : left;
        const auto kernel = some == 1 ? few_rows<W, 1> : some == 2 ? few_rows<W, 2> : few_rows<W, STREAMS>;
        for (int u = 0; u < units; u += FETCH_AHEAD) {
            const int depth = std::min(FETCH_AHEAD, units - u);
            const Panels then = u + depth < units ? w.from(p, u + depth) : left > some ? w.from(p + some) : next;
            for (int r = 0; r < blocks; r++)
                kernel(w.from(p, u), depth, x + r * ROWS * stride + u, stride, out + r * ROWS * width + p * LANES,
                       width, u == 0, then.from(0, r * depth / blocks), pace);
        }
    }
}

// Without a loop or a call for the two counts that a hot path has
template <class T>
void copy(const T* from, T* to, int count) {
    if (count == LANES)
        memcpy(to, from, sizeof(T) * LANES);
    else if (count == LANES / 2)
        memcpy(to, from, sizeof(T) * LANES / 2);
    else
        for (int l = 0; l < count; l++) to[l] = from[l];
}

// The first ``count`` of v become elements from ``at`` on of a row of x, of ``inputs`` elements
void put(vec v, float* row, int, int at, int count) { copy((float*)&v, row + at, count); }
#ifdef __AVX512BF16__
void put(vec v, bf16* row, int, int at, int count) {
    bf16 narrow[LANES];
    store(v, narrow);
    copy(narrow, row + at, count);
}

void put(vec v, split* row, int inputs, int at, int count) {
    for (int i = 0; i < 3; i++, at += round_up(inputs, DEPTH)) {
        bf16 nearest[LANES];
        store(v, nearest);
        copy(nearest, (bf16*)row + at, count);
        v -= (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i*)nearest)), 16);
    }
}
#endif

// e^x to a relative error of 2e-7; 0 below -87
vec exponential(vec x) {
    const ivec lost = x < -87.0f;
    x = lost ? vec{} : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const ivec n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? vec{} - 0.5f : vec{} + 0.5f), ivec);
    const vec k = __builtin_convertvector(n, vec);
    const vec r = x - k * 0.693359375f + k * 2.12194440e-4f;  // x - k log 2, with log 2 in two parts
    vec y = 1.0f / 120 + r * (1.0f / 720);
    y = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * y))));
    return lost ? vec{} : y * (vec)((n + 127) << 23);
}

// 16 channels in pairs (a, b) -> (a cos - b sin, b cos + a sin); turn holds cos, cos, ... and -sin, sin, ...
vec rotate(const float* x, const float* turn, int channels) {
    const vec v = load(x);
    const vec swapped = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v * load(turn) + swapped * load(turn + channels);
}

struct alignas(64) Line {
    uint32_t units[LANES];
};

// Memory that begins with a cache line and only grows; zeros at first
template <class T>
class Buffer {
  public:
    void reserve(size_t size) { lines.resize(std::max(lines.size(), (size * sizeof(T) + 63) / 64)); }
    T& operator[](size_t i) { return ((T*)lines.data())[i]; }

  private:
    std::vector<Line> lines;
};

template <class W>
class Decoder {
    using A = std::conditional_t<SPLIT<W>, float, W>;  // what attention multiplies

  public:
    explicit Decoder(const Model& model) : m(model), layers(model.layers, model.layers + model.n_layer) {}

    // x (batch t, dim), overwritten: all blocks and the final norm, of slots from ``start``, into hidden
    void trunk(float* x, float* hidden, const Cache& cache, int batch, int t, int start) {
        reserve(batch * t);
#pragma omp parallel
        {
            if (tiled) configure_tiles();
            for (int i = 0; i < m.n_layer; i++) {
                const Layer& layer = layers[i];
                normalise(x, layer.attention_norm, batch * t);
                matmul(layer.wqkv, m.dim, qkv_width, narrow, batch * t, [&](int row, int at, const float* sums) {
                    store(load(sums), &qkv[(size_t)row * qkv_stride + at]);
                });
#pragma omp for schedule(static)
                for (int a = 0; a < batch * m.kv_heads; a++) {
                    const int row = a / m.kv_heads, head = a % m.kv_heads;
                    attend(cache.at + i * cache.layer_stride + row * cache.row_stride + head * cache.head_stride,
                           cache.head_stride, row, head, t, start);
                }
                matmul(layer.wo, m.dim, m.dim, narrow, batch * t, Add{x, m.dim});
                normalise(x, layer.ffn_norm, batch * t);
                matmul(layer.w13, m.dim, 2 * m.ffn_dim, narrow, batch * t, [&](int row, int at, const float* sums) {
                    const vec gate = load(sums);  // and what it gates in its upper half
                    const vec up = __builtin_shufflevector(gate, gate, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12,
                                                           13, 14, 15);
                    put(gate / (1.0f + exponential(-gate)) * up, (W*)&wide[(size_t)row * row_units<W>(m.ffn_dim)],
                        m.ffn_dim, at / 2, LANES / 2);
                });
                matmul(layer.w2, m.ffn_dim, m.dim, wide, batch * t, Add{x, m.dim});
            }
#pragma omp for schedule(static)
            for (int r = 0; r < batch * t; r++) {
                const float scale = inverse_rms(x + (size_t)r * m.dim);
                for (int i = 0; i < m.dim; i++)
                    hidden[(size_t)r * m.dim + i] = x[(size_t)r * m.dim + i] * scale * m.norm[i];
            }
            release_tiles();
        }
    }

    // hidden (rows, dim) -> logits (rows, vocab_size)
    void head(const float* hidden, float* logits, int rows) {
        reserve(rows);
#pragma omp parallel
        {
            if (tiled) configure_tiles();
#pragma omp for schedule(static)
            for (int r = 0; r < rows; r++) narrow_row(hidden + (size_t)r * m.dim, nullptr, 1.0f, r);
            matmul(m.head, m.dim, m.vocab_size, narrow, rows, [&](int row, int at, const float* sums) {
                memcpy(logits + (size_t)row * m.vocab_size + at, sums, 4 * std::min(LANES, m.vocab_size - at));
            });
            release_tiles();
        }
    }

  private:
    struct Add {  // to the residual stream
        float* x;
        int dim;

        void operator()(int row, int at, const float* sums) const {
            float* to = x + (size_t)row * dim + at;
            if (at + LANES <= dim) return store(load(to) + load(sums), to);
            for (int l = 0; l < dim - at; l++) to[l] += sums[l];
        }
    };

    struct Scratch {  // of one thread
        Buffer<float> products;
        Buffer<uint32_t> queries, weights;  // and the rest of one head
        Buffer<float> scores, mixed, sums;
    };

    static void release_tiles() {
#ifdef AMX
        if (tiled) _tile_release();
#endif
    }

    // room for so many rows; grows once, at the largest step
    void reserve(int rows) {
        rows = round_up(rows, ROW_BLOCK);
        narrow.reserve((size_t)rows * row_units<W>(m.dim));
        wide.reserve((size_t)rows * row_units<W>(m.ffn_dim));
        qkv.reserve((size_t)rows * qkv_stride);
        scratch.resize(std::max(scratch.size(), (size_t)omp_get_max_threads()));
        for (Scratch& s : scratch) s.products.reserve((size_t)rows * 4 * LANES);
    }

    float inverse_rms(const float* x) const {
        vec squares = {};
        int i = 0;
        for (; i + LANES <= m.dim; i += LANES) squares += load(x + i) * load(x + i);
        float sum = total(squares);
        for (; i < m.dim; i++) sum += x[i] * x[i];
        return 1.0f / std::sqrt(sum / m.dim + m.eps);
    }

    // row r of ``narrow`` = x (dim) * scale * weight
    void narrow_row(const float* x, const float* weight, float scale, int r) {
        W* to = (W*)&narrow[(size_t)r * row_units<W>(m.dim)];
        int i = 0;
        for (; i + LANES <= m.dim; i += LANES)
            put(load(x + i) * scale * (weight ? load(weight + i) : vec{} + 1.0f), to, m.dim, i, LANES);
        float some[LANES] = {};
        for (int l = 0; l < m.dim - i; l++) some[l] = x[i + l] * scale * (weight ? weight[i + l] : 1);
        put(load(some), to, m.dim, i, m.dim - i);
    }

    void normalise(const float* x, const float* weight, int rows) {
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            const float* row = x + (size_t)r * m.dim;
            narrow_row(row, weight, inverse_rms(row), r);
        }
    }

    // x (rows, inputs) times w, panels over the threads; write(row, output, 16 sums) takes the result
    template <class F>
    void matmul(const uint32_t* w, int inputs, int outputs, Buffer<uint32_t>& x, int rows, F write) {
        const int units = units_of<W>(inputs), stride = row_units<W>(inputs), panels = ceil_div(outputs, LANES);
        const int group = SPLIT<W> ? 2 : row_step == 16 ? 4 : STREAMS;
        const int groups = ceil_div(panels, group), thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int begin = groups * thread / threads, end = groups * (thread + 1) / threads;
        const Panels all = {w, (size_t)units * LANES};
        float* out = &scratch[thread].products[0];
        const auto finish = [&](int g, int first, int count) {
            const int p = g * group, some = std::min(group, panels - p), width = (SPLIT<W> ? group : some) * LANES;
            for (int r = 0; r < count; r++)
                for (int c = 0; c < some; c++) write(first + r, (p + c) * LANES, out + r * width + c * LANES);
        };
        if constexpr (SPLIT<W>)
            split_product(all.from(begin * group), end - begin, units, &x[0], stride, round_up(rows, row_step), out,
                          [&](int g) { finish(begin + g, 0, rows); });
        else
            for (int g = begin; g < end; g++) {
                const int p = g * group, some = std::min(group, panels - p);
                for (int r = 0; r < rows; r += ROW_BLOCK) {
                    const int block = std::min(ROW_BLOCK, rows - r);
                    product<W>(all.from(p), some, units, &x[(size_t)r * stride], stride, round_up(block, row_step), out,
                               some * LANES, all.from(p + some));
                    finish(g, r, block);
                }
            }
#pragma omp barrier
    }

    // One key-value head of one row: its new keys and values go into the cache, its queries look at all there is.
    void attend(uint32_t* keys, int64_t head_stride, int row, int head, int t, int start) {
        const int hd = m.head_dim, channels = round_up(hd, LANES), group = m.n_head / m.kv_heads, stop = start + t;
        const int key_units = units_of<A>(hd), slot_units = units_of<A>(m.slots);
        const int used = round_up(ceil_div(stop, PER<A>), LANES);  // units of the slots there are
        const int queries = group * t, rows = round_up(queries, query_step), length = slot_units * PER<A>;
        const int query_stride = row_units<A>(hd), weight_stride = row_units<A>(m.slots);
        uint32_t* values = keys + (size_t)length * key_units;
        Scratch& s = scratch[omp_get_thread_num()];
        s.queries.reserve((size_t)rows * query_stride);
        s.weights.reserve((size_t)rows * weight_stride);
        s.scores.reserve((size_t)rows * length);
        s.mixed.reserve((size_t)rows * channels);
        s.sums.reserve(queries);
        if (start == 0) std::fill(keys, keys + head_stride, 0);  // what is yet to come counts 0 times: not if NaN

        for (int i = 0; i < t; i++) {
            const float* of_token = &qkv[(size_t)(row * t + i) * qkv_stride];
            const float* turn = m.rotary + (size_t)(start + i) * 2 * channels;
            for (int g = 0; g < group; g++) {
                const float* query = of_token + (head * group + g) * hd;
                A* to = (A*)&s.queries[(size_t)(g * t + i) * query_stride];
                for (int d = 0; d < channels; d += LANES)
                    store(rotate(query + d, turn + d, channels) / std::sqrt((float)hd), to + d);
            }
            const float* key = of_token + (m.n_head + head) * hd;
            const float* value = key + m.kv_heads * hd;
            const int slot = start + i;
            A* k = (A*)(keys + (size_t)(slot / LANES) * key_units * LANES) + slot % LANES * PER<A>;
            A* v = (A*)(values + (size_t)(slot / PER<A>) * LANES) + slot % PER<A>;
            for (int d = 0; d < channels; d += LANES, v += (size_t)slot_units * LANES * PER<A>) {
                A turned[LANES], plain[LANES];
                store(rotate(key + d, turn + d, channels), turned);
                store(load(value + d), plain);
                for (int l = 0; l < std::min(LANES, hd - d); l++) {
                    k[(d + l) / PER<A> * LANES * PER<A> + l % PER<A>] = turned[l];
                    v[l * PER<A>] = plain[l];
                }
            }
        }

        const Panels all_keys = {keys, (size_t)key_units * LANES}, all_values = {values, (size_t)slot_units * LANES};
        product<A>(all_keys, ceil_div(stop, LANES), key_units, &s.queries[0], query_stride, rows, &s.scores[0], length,
                   all_values);
        for (int q = 0; q < queries; q++)
            s.sums[q] = softmax(&s.scores[(size_t)q * length], stop, used * PER<A>,
                                (A*)&s.weights[(size_t)q * weight_stride]);
        product<A>(all_values, channels / LANES, used, &s.weights[0], weight_stride, rows, &s.mixed[0], channels,
                   {keys + head_stride, all_keys.stride});
        for (int q = 0; q < queries; q++) {
            W* to = (W*)&narrow[(size_t)(row * t + q % t) * row_units<W>(m.dim)];
            for (int d = 0; d < hd; d += LANES)
                put(load(&s.mixed[(size_t)q * channels + d]) / s.sums[q], to, m.dim, (head * group + q / t) * hd + d,
                    std::min(LANES, hd - d));
        }
    }

    // weights (length) = e^(score - the largest), 0 from ``stop`` on; returns their sum
    static float softmax(float* scores, int stop, int length, A* weights) {
        std::fill(scores + stop, scores + length, -INFINITY);
        vec tops = load(scores), sums = {};
        for (int j = LANES; j < length; j += LANES) tops = load(scores + j) > tops ? load(scores + j) : tops;
        float top = tops[0];
        for (int l = 1; l < LANES; l++) top = std::max(top, tops[l]);
        for (int j = 0; j < length; j += LANES) {
            const vec e = exponential(load(scores + j) - top);
            sums += e;
            store(e, weights + j);
        }
        return total(sums);
    }

    Model m;
    const int query_step = sizeof(W) == 2 && tiled ? 16 : ROWS;  // rows of attention's products, and of the others,
    const int row_step = SPLIT<W> ? 32 : query_step;             // come in multiples of these
    std::vector<Layer> layers;
    const int qkv_width = (m.n_head + 2 * m.kv_heads) * m.head_dim;
    const int qkv_stride = round_up(qkv_width + LANES, LANES);  // a head's last 16 channels may be read past its end
    Buffer<uint32_t> narrow, wide;  // (rows, units), of width dim and ffn_dim
    Buffer<float> qkv;              // (rows, qkv_stride)
    std::vector<Scratch> scratch;        // of each thread
};

}  // namespace

extern "C" {

#define DECODER(W, name)                                                                                             \
    void* create_##name(const Model* model) { return new Decoder<W>(*model); }                                       \
    void destroy_##name(void* decoder) { delete (Decoder<W>*)decoder; }                                              \
    void trunk_##name(void* decoder, float* x, float* hidden, const Cache* cache, int batch, int t, int start) {     \
        ((Decoder<W>*)decoder)->trunk(x, hidden, *cache, batch, t, start);                                           \
    }                                                                                                                \
    void head_##name(void* decoder, const float* hidden, float* logits, int rows) {                                  \
        ((Decoder<W>*)decoder)->head(hidden, logits, rows);                                                          \
    }

DECODER(float, float32)
#ifdef __AVX512BF16__
DECODER(bf16, bfloat16)
#endif
#ifdef AMX
DECODER(split, split)
#endif

// Ask the kernel for the right to use AMX; to be called once, before anything else. Whether there are tiles
bool start() {
#ifdef AMX
    tiled = syscall(SYS_arch_prctl, /* ARCH_REQ_XCOMP_PERM */ 0x1023, /* tile data */ 18) == 0;
#endif
    return tiled;
}
}
