// One decoding step of the GPT on a CPU: blocks, final norm and output layer. At few rows its time is that of reading
// the weights and the cache once; layout.h says how they are laid out for that, products.h how they are multiplied.
// Built by build.py, called and fed by decoder.py.
//
// Sums, the residual stream and the softmax are float32. A row's result depends neither on other rows nor on the number
// of threads.

#include <omp.h>

#include <cmath>

#include "products.h"

// The structures of decoder.py.
struct Layer {
    const uint32_t *wqkv, *wo, *w13, *w2;  // panels; w13 has 8 outputs of w1, then the same 8 of w3, in each
    const float *attention_norm, *ffn_norm;
};

struct Model {
    const Layer* layers;
    const float *norm, *rotary;  // rotary: (slots, 2, channels), see rotate
    const uint32_t* head;        // panels
    const int32_t* seen;         // of each slot, how many slots it attends to
    int32_t n_layer, dim, n_head, kv_heads, head_dim, ffn_dim, vocab_size, slots;
    float eps;
};

struct Cache {
    uint32_t* at;
    int64_t layer_stride, row_stride, head_stride;  // units
};

namespace {

template <class W>
class Decoder {
    using A = Cached<W>;
    using XW = Factor<W>;
    using XA = Factor<A>;
    static constexpr bool TILES = IS_TILED<W> || IS_SPLIT<W>;

  public:
    explicit Decoder(const Model& model) : m(model), layers(model.layers, model.layers + model.n_layer) {}

    // x (batch t, dim), overwritten: all blocks and the final norm, of slots from ``start``, into hidden
    void trunk(float* x, float* hidden, const Cache& cache, int batch, int t, int start) {
        reserve(batch * t);
#pragma omp parallel
        {
            if (TILES) configure_tiles();
            for (int i = 0; i < m.n_layer; i++) {
                const Layer& layer = layers[i];
                normalise(x, layer.attention_norm, batch * t);
                matmul(layer.wqkv, m.dim, qkv_width, rows_of_dim, batch * t, [&](int row, int at, const float* sums) {
                    memcpy(&qkv[(size_t)row * qkv_stride + at], sums, 4 * LANES);
                });
#pragma omp for schedule(static)
                for (int a = 0; a < batch * m.kv_heads; a++) {
                    const int row = a / m.kv_heads, head = a % m.kv_heads;
                    attend(cache.at + i * cache.layer_stride + row * cache.row_stride + head * cache.head_stride,
                           cache.head_stride, row, head, t, start);
                }
                matmul(layer.wo, m.dim, m.dim, rows_of_dim, batch * t, Add{x, m.dim});
                normalise(x, layer.ffn_norm, batch * t);
                matmul(layer.w13, m.dim, 2 * m.ffn_dim, rows_of_dim, batch * t, [&](int row, int at, const float* sums) {
                    XW* to = (XW*)&rows_of_ffn[(size_t)row * row_units<W>(m.ffn_dim)];
                    for (int l = 0; l < LANES / 2; l += WIDTH) {
                        const vec gate = load(sums + l), up = load(sums + LANES / 2 + l);
                        put(gate / (1.0f + exponential(-gate)) * up, to, m.ffn_dim, at / 2 + l,
                            std::min(WIDTH, LANES / 2));
                    }
                });
                matmul(layer.w2, m.ffn_dim, m.dim, rows_of_ffn, batch * t, Add{x, m.dim});
            }
#pragma omp for schedule(static)
            for (int r = 0; r < batch * t; r++) {
                const float scale = inverse_rms(x + (size_t)r * m.dim);
                for (int i = 0; i < m.dim; i++)
                    hidden[(size_t)r * m.dim + i] = x[(size_t)r * m.dim + i] * scale * m.norm[i];
            }
            if (TILES) release_tiles();
        }
    }

    // hidden (rows, dim) -> logits (rows, vocab_size)
    void head(const float* hidden, float* logits, int rows) {
        reserve(rows);
#pragma omp parallel
        {
            if (TILES) configure_tiles();
#pragma omp for schedule(static)
            for (int r = 0; r < rows; r++) put_row(hidden + (size_t)r * m.dim, nullptr, 1.0f, r);
            matmul(m.head, m.dim, m.vocab_size, rows_of_dim, rows, [&](int row, int at, const float* sums) {
                memcpy(logits + (size_t)row * m.vocab_size + at, sums, 4 * std::min(LANES, m.vocab_size - at));
            });
            if (TILES) release_tiles();
        }
    }

  private:
    struct Add {  // to the residual stream
        float* x;
        int dim;

        void operator()(int row, int at, const float* sums) const {
            float* to = x + (size_t)row * dim + at;
            const int count = std::min(LANES, dim - at);
            for (int l = 0; l < count; l++) to[l] += sums[l];
        }
    };

    struct Scratch {  // of one thread
        Buffer<float> products;
        Buffer<uint32_t> queries, weights;  // and the rest of one head
        Buffer<float> scores, mixed, sums;
    };

    // Make room for so many rows; grows once, at the largest step.
    void reserve(int rows) {
        rows = round_up(rows, ROW_BLOCK);
        rows_of_dim.reserve((size_t)rows * row_units<W>(m.dim));
        rows_of_ffn.reserve((size_t)rows * row_units<W>(m.ffn_dim));
        qkv.reserve((size_t)rows * qkv_stride);
        scratch.resize(std::max(scratch.size(), (size_t)omp_get_max_threads()));
        for (Scratch& s : scratch) s.products.reserve((size_t)rows * 4 * LANES + LANES);  // the gate reads past its end
    }

    float inverse_rms(const float* x) const {
        vec squares = {};
        int i = 0;
        for (; i + WIDTH <= m.dim; i += WIDTH) squares += load(x + i) * load(x + i);
        float sum = total(squares);
        for (; i < m.dim; i++) sum += x[i] * x[i];
        return 1.0f / std::sqrt(sum / m.dim + m.eps);
    }

    // row r of rows_of_dim = x (dim) * scale * weight
    void put_row(const float* x, const float* weight, float scale, int r) {
        XW* to = (XW*)&rows_of_dim[(size_t)r * row_units<W>(m.dim)];
        int i = 0;
        for (; i + WIDTH <= m.dim; i += WIDTH)
            put(load(x + i) * scale * (weight ? load(weight + i) : vec{} + 1.0f), to, m.dim, i, WIDTH);
        float rest[WIDTH] = {};
        for (int l = 0; l < m.dim - i; l++) rest[l] = x[i + l] * scale * (weight ? weight[i + l] : 1);
        put(load(rest), to, m.dim, i, m.dim - i);
    }

    void normalise(const float* x, const float* weight, int rows) {
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            const float* row = x + (size_t)r * m.dim;
            put_row(row, weight, inverse_rms(row), r);
        }
    }

    // x (rows, inputs) times w, panels dealt out to the threads; write(row, output, 16 sums) takes the result
    template <class F>
    void matmul(const uint32_t* w, int inputs, int outputs, Buffer<uint32_t>& x, int rows, F write) {
        const int units = units_of<W>(inputs), stride = row_units<W>(inputs), panels = ceil_div(outputs, LANES);
        const int group = IS_SPLIT<W> ? 2 : IS_TILED<W> ? 4 : Block<float>::panels;
        const int groups = ceil_div(panels, group), thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int begin = groups * thread / threads, end = groups * (thread + 1) / threads;
        const Panels all = {w, (size_t)units * LANES};
        float* out = &scratch[thread].products[0];
        const auto finish = [&](int g, int first, int count) {
            const int p = g * group, used = std::min(group, panels - p), width = (IS_SPLIT<W> ? group : used) * LANES;
            for (int r = 0; r < count; r++)
                for (int c = 0; c < used; c++) write(first + r, (p + c) * LANES, out + r * width + c * LANES);
        };
        if constexpr (IS_SPLIT<W>)
            split_product(all.from(begin * group), end - begin, units, &x[0], stride, round_up(rows, row_step), out,
                          [&](int g) { finish(begin + g, 0, rows); });
        else
            for (int g = begin; g < end; g++) {
                const int p = g * group, used = std::min(group, panels - p);
                for (int r = 0; r < rows; r += ROW_BLOCK) {
                    const int block = std::min(ROW_BLOCK, rows - r);
                    product<W>(all.from(p), used, units, &x[(size_t)r * stride], stride, round_up(block, row_step), out,
                               used * LANES, all.from(p + used));
                    finish(g, r, block);
                }
            }
#pragma omp barrier
    }

    // Attention of one key-value head of one row: its new keys and values go into the cache, and each query attends to
    // the slots that it sees.
    void attend(uint32_t* keys, int64_t head_stride, int row, int head, int t, int start) {
        const int hd = m.head_dim, channels = round_up(hd, LANES), group = m.n_head / m.kv_heads, stop = start + t;
        const int key_units = units_of<A>(hd), slot_units = units_of<A>(m.slots);
        const int used = round_up(ceil_div(stop, PER_UNIT<A>), LANES);  // units of the slots there are
        const int queries = group * t, rows = round_up(queries, query_step), length = slot_units * PER_UNIT<A>;
        const int query_stride = row_units<A>(hd), weight_stride = row_units<A>(m.slots);
        uint32_t* values = keys + (size_t)length * key_units;
        Scratch& s = scratch[omp_get_thread_num()];
        s.queries.reserve((size_t)rows * query_stride);
        s.weights.reserve((size_t)rows * weight_stride);
        s.scores.reserve((size_t)rows * length);
        s.mixed.reserve((size_t)rows * channels);
        s.sums.reserve(queries);
        if (start == 0) std::fill(keys, keys + head_stride, 0);  // later slots have weight 0, which NaN would survive
        remember(keys, values, row, head, t, start);

        for (int i = 0; i < t; i++) {
            const float* turn = m.rotary + (size_t)(start + i) * 2 * channels;
            for (int g = 0; g < group; g++) {
                const float* query = &qkv[(size_t)(row * t + i) * qkv_stride + (head * group + g) * hd];
                XA* to = (XA*)&s.queries[(size_t)(g * t + i) * query_stride];
                for (int d = 0; d < channels; d += WIDTH)
                    store(rotate(query + d, turn + d, channels) / std::sqrt((float)hd), to + d);
            }
        }

        const Panels all_keys = {keys, (size_t)key_units * LANES}, all_values = {values, (size_t)slot_units * LANES};
        product<A>(all_keys, ceil_div(stop, LANES), key_units, &s.queries[0], query_stride, rows, &s.scores[0], length,
                   all_values);
        for (int q = 0; q < queries; q++)
            s.sums[q] = softmax(&s.scores[(size_t)q * length], m.seen[start + q % t], used * PER_UNIT<A>,
                                (XA*)&s.weights[(size_t)q * weight_stride]);
        product<A>(all_values, channels / LANES, used, &s.weights[0], weight_stride, rows, &s.mixed[0], channels,
                   {keys + head_stride, all_keys.stride});
        for (int q = 0; q < queries; q++) {
            XW* to = (XW*)&rows_of_dim[(size_t)(row * t + q % t) * row_units<W>(m.dim)];
            for (int d = 0; d < hd; d += WIDTH)
                put(load(&s.mixed[(size_t)q * channels + d]) / s.sums[q], to, m.dim, (head * group + q / t) * hd + d,
                    std::min(WIDTH, hd - d));
        }
    }

    // Write the keys and values of slots [start, start + t) of one head of one row into the cache.
    void remember(uint32_t* keys, uint32_t* values, int row, int head, int t, int start) {
        const int hd = m.head_dim, channels = round_up(hd, LANES), key_units = units_of<A>(hd);
        const size_t value_stride = (size_t)units_of<A>(m.slots) * LANES * PER_UNIT<A>;  // elements of a panel
        for (int slot = start; slot < start + t; slot++) {
            const float* key = &qkv[(size_t)(row * t + slot - start) * qkv_stride + (m.n_head + head) * hd];
            const float* value = key + m.kv_heads * hd;
            const float* turn = m.rotary + (size_t)slot * 2 * channels;
            A* k = (A*)(keys + (size_t)(slot / LANES) * key_units * LANES) + slot % LANES * PER_UNIT<A>;
            A* v = (A*)(values + (size_t)(slot / PER_UNIT<A>)*LANES) + slot % PER_UNIT<A>;
            for (int d = 0; d < hd; d += WIDTH) {
                A turned[WIDTH], plain[WIDTH];
                store(rotate(key + d, turn + d, channels), turned);
                store(load(value + d), plain);
                for (int l = 0; l < std::min(WIDTH, hd - d); l++) {
                    const int c = d + l;
                    k[c / PER_UNIT<A> * LANES * PER_UNIT<A> + c % PER_UNIT<A>] = turned[l];
                    v[c / LANES * value_stride + c % LANES * PER_UNIT<A>] = plain[l];
                }
            }
        }
    }

    // weights (length) = e^(score - the largest), 0 from ``seen`` on; returns their sum
    static float softmax(float* scores, int seen, int length, XA* weights) {
        std::fill(scores + seen, scores + length, -INFINITY);
        vec tops = load(scores), sums = {};
        for (int j = WIDTH; j < length; j += WIDTH) tops = load(scores + j) > tops ? load(scores + j) : tops;
        float top = tops[0];
        for (int l = 1; l < WIDTH; l++) top = std::max(top, tops[l]);
        for (int j = 0; j < length; j += WIDTH) {
            const vec e = exponential(load(scores + j) - top);
            sums += e;
            store(e, weights + j);
        }
        return total(sums);
    }

    Model m;
    static constexpr int query_step = IS_TILED<W> ? 16 : 1;         // rows of attention's products, and of the others,
    static constexpr int row_step = IS_SPLIT<W> ? 32 : query_step;  // come in multiples of these
    std::vector<Layer> layers;
    const int qkv_width = (m.n_head + 2 * m.kv_heads) * m.head_dim;
    const int qkv_stride = round_up(qkv_width + LANES, LANES);  // a head's last 16 channels may be read past its end
    Buffer<uint32_t> rows_of_dim, rows_of_ffn;                  // activations that a product reads
    Buffer<float> qkv;                                          // (rows, qkv_stride)
    std::vector<Scratch> scratch;                               // of each thread
};

}  // namespace

extern "C" {

#define DECODER(W, name)                                                                                               \
    void* create_##name(const Model* model) { return new Decoder<W>(*model); }                                         \
    void destroy_##name(void* decoder) { delete (Decoder<W>*)decoder; }                                                \
    void trunk_##name(void* decoder, float* x, float* hidden, const Cache* cache, int batch, int t, int start) {       \
        ((Decoder<W>*)decoder)->trunk(x, hidden, *cache, batch, t, start);                                             \
    }                                                                                                                  \
    void head_##name(void* decoder, const float* hidden, float* logits, int rows) {                                    \
        ((Decoder<W>*)decoder)->head(hidden, logits, rows);                                                            \
    }

DECODER(float, float32)
DECODER(stored_bf16, bfloat16)
#ifdef AMX
DECODER(tile_bf16, bfloat16_tiles)
DECODER(split, float32_tiles)
#endif

// Prepare the processor, once and before anything else; returns whether the decoders by tiles may be used.
bool start() { return allow_tiles(); }

// torch and this library may have an OpenMP runtime each; this one follows torch's number of threads.
void set_threads(int count) { omp_set_num_threads(count); }
}
