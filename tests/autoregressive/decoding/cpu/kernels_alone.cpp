// The kernels on a small random model, without Python: prints logits of four steps in float32 and bfloat16. To be
// compared between processors, real or emulated; see test_decoder.py.
#include "../../../../autoregressive/decoding/cpu/decoder.cpp"

#include <cstdio>

struct Random {
    uint32_t state = 1;
    float operator()() { return (int32_t)(state = state * 1664525 + 1013904223) * 0x1p-31f; }
};

// so many panels of random weights, zero where a matrix is padded
template <class W>
std::vector<uint32_t> panels(int outputs, int inputs, Random& random) {
    const int units = units_of<W>(inputs);
    std::vector<uint32_t> all((size_t)round_up(outputs, 2 * LANES) * units);
    W* to = (W*)all.data();
    for (int o = 0; o < outputs; o++)
        for (int i = 0; i < inputs; i++) {
            const float weight = random() / std::sqrt((float)inputs);
            const size_t at = (size_t)(o / LANES * units + i / PER_UNIT<W>) * LANES + o % LANES;
            W padded[WIDTH];
            store(vec{} + weight, padded);
            to[at * PER_UNIT<W> + i % PER_UNIT<W>] = padded[0];
        }
    return all;
}

template <class W>
void run() {
    constexpr int DIM = 72, HEADS = 2, HD = 36, FFN = 40, VOCAB = 50, SLOTS = 16, ROWS = 5, T = 4, CHANNELS = 48;
    Random random;
    const auto wqkv = panels<W>(3 * DIM, DIM, random), wo = panels<W>(DIM, DIM, random);
    const auto w13 = panels<W>(2 * FFN, DIM, random), w2 = panels<W>(DIM, FFN, random);
    const auto head = panels<W>(VOCAB, DIM, random);
    std::vector<float> norm(DIM, 1.0f), rotary(SLOTS * 2 * CHANNELS), x(ROWS * T * DIM), logits(ROWS * T * VOCAB);
    for (int i = 0; i < SLOTS * 2 * CHANNELS; i++) rotary[i] = i % CHANNELS < HD ? random() : 0;
    const Layer layer = {wqkv.data(), wo.data(), w13.data(), w2.data(), norm.data(), norm.data()};
    const Layer layers[] = {layer, layer};
    int32_t seen[SLOTS];  // slots of a window of T steps of one slot
    for (int i = 0; i < SLOTS; i++) seen[i] = i + 1;
    const Model model = {layers, norm.data(), rotary.data(), head.data(), seen, 2, DIM, HEADS, HEADS, HD, FFN, VOCAB, SLOTS, 1e-5f};
    const int slot_units = units_of<W>(SLOTS), stride = slot_units * PER_UNIT<W> * units_of<W>(HD) + slot_units * CHANNELS;
    std::vector<uint32_t> store(2 * ROWS * HEADS * stride);
    const Cache cache = {store.data(), (int64_t)ROWS * HEADS * stride, (int64_t)HEADS * stride, stride};
    Decoder<W> decoder(model);
    for (int start = 0; start < SLOTS; start += T) {
        for (float& value : x) value = random();
        std::vector<float> hidden(x.size());
        decoder.trunk(x.data(), hidden.data(), cache, ROWS, T, start);
        decoder.head(hidden.data(), logits.data(), ROWS * T);
        for (float logit : logits) printf("%.6f\n", logit);
    }
}

int main() {
    run<float>();
    run<stored_bf16>();
}
