// Calls every entry point of the native kernels with awkward shapes, for the sanitizers (tools/sanitize). Results are
// checked in Python; here they only have to be finite. Buffers are exactly as large as api.hpp requires.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "api.hpp"
#include "latents.hpp"

using dsv2::LatentDtype;
using dsv2::Latents;
using dsv2::Matrix;

namespace {

std::mt19937 random_bits(1);

std::vector<float> numbers(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> x(count);
    for (float& v : x) v = normal(random_bits);
    return x;
}

void finite(const char* what, const std::vector<float>& y) {
    for (float v : y)
        if (!std::isfinite(v)) {
            std::printf("%s: not finite\n", what);
            std::exit(1);
        }
}

int64_t nbytes(int64_t rows, int64_t cols, int32_t format) { return Matrix{nullptr, nullptr, rows, cols, format}.nbytes(); }

// Quantise random numbers into memory at `at`, in the layout of a record.
Matrix fill(uint8_t* at, int64_t rows, int64_t cols, int32_t format) {
    Matrix m{at, nullptr, rows, cols, format};
    uint16_t* scales = reinterpret_cast<uint16_t*>(at + m.code_bytes());
    m.scales = scales;
    (format ? dsv2_quantize_int8 : dsv2_quantize_nf4)(numbers(rows * cols).data(), rows, cols, at, scales);
    return m;
}

struct Stored {
    std::unique_ptr<uint8_t[]> bytes;
    Matrix m;
    Stored(int64_t rows, int64_t cols, int32_t format)
        : bytes(new uint8_t[nbytes(rows, cols, format)]), m(fill(bytes.get(), rows, cols, format)) {}
};

void products(int32_t format) {
    for (int64_t tokens : {1, 2, 7, 300})
        for (int64_t rows : {1, 24, 72})
            for (int64_t cols : {5, 64, 200}) {
                const Stored weight(rows, cols, format);
                std::vector<float> y(tokens * rows);
                dsv2_linear(numbers(tokens * cols).data(), tokens, 1, &weight.m, y.data());
                finite("linear", y);
                std::vector<int64_t> ids(tokens);
                for (auto& id : ids) id = random_bits() % rows;
                std::vector<float> embedded(tokens * cols);
                dsv2_embedding(ids.data(), tokens, &weight.m, embedded.data());
                finite("embedding", embedded);
            }
}

void mixtures(int32_t format) {
    for (int64_t tokens : {1, 3, 270})
        for (int64_t hidden : {64, 100})
            for (int64_t intermediate : {44, 128}) {
                const Stored gate(intermediate, hidden, format), up(intermediate, hidden, format), down(hidden, intermediate, format);
                std::vector<float> y(tokens * hidden);
                const auto x = numbers(tokens * hidden);
                dsv2_swiglu(x.data(), tokens, &gate.m, &up.m, &down.m, y.data());
                finite("swiglu", y);
                const int64_t E = 6, K = 2, wide = nbytes(intermediate, hidden, format);
                const int64_t record = 2 * wide + nbytes(hidden, intermediate, format);
                std::unique_ptr<uint8_t[]> records(new uint8_t[E * record]);
                for (int64_t e = 0; e < E; e++) {
                    fill(records.get() + e * record, intermediate, hidden, format);
                    fill(records.get() + e * record + wide, intermediate, hidden, format);
                    fill(records.get() + e * record + 2 * wide, hidden, intermediate, format);
                }
                std::vector<int64_t> ids(tokens * K);
                std::vector<float> weights(tokens * K);
                const auto gates = numbers(E * hidden);
                dsv2_route(x.data(), tokens, hidden, gates.data(), E, K, 3, 2, tokens % 2, 1.0f, ids.data(), weights.data());
                dsv2_experts(x.data(), tokens, records.get(), record, E, format, hidden, intermediate, ids.data(),
                             weights.data(), K, y.data());
                finite("experts", y);
                std::vector<int64_t> owner(tokens * K), rows(tokens * K);
                for (int64_t i = 0; i < tokens * K; i++) owner[i] = i / K, rows[i] = i % 5 ? i : -1;
                std::vector<float> outputs(tokens * K * hidden);
                dsv2_expert_outputs(x.data(), tokens, records.get(), record, E, format, hidden, intermediate, owner.data(),
                                    ids.data(), tokens * K, outputs.data());
                dsv2_combine(outputs.data(), tokens, K, hidden, rows.data(), ids.data(), weights.data(), y.data());
                finite("expert outputs", y);
            }
}

void attention(LatentDtype dtype, int64_t C, int64_t P) {
    const int64_t H = 3, N = 16, V = 24, row = Latents{nullptr, dtype, C, P, nullptr}.row_bytes();
    const Stored uk(H * C, N, 1), uv(H * V, C, 1);
    for (int64_t tokens : {1, 5, 90})
        for (int64_t cached : {0, 3, 600}) {
            // Two sequences of the same blocks, as with a common prefix; the second has three tokens more in the step.
            const int64_t more = cached ? std::min<int64_t>(3, cached) : 0, T = 2 * tokens + more, all = cached + tokens;
            const auto kv_a = numbers(all * (C + P)), weight = numbers(C), rotation = numbers(std::max(all, T) * P);
            const int64_t blocks = (all + dsv2::CACHE_BLOCK - 1) / dsv2::CACHE_BLOCK;
            const std::unique_ptr<uint8_t[]> rows(new uint8_t[blocks * dsv2::CACHE_BLOCK * row]);
            std::vector<int64_t> tables{0};
            for (int64_t block = blocks; block > 0; block--) tables.push_back(block - 1);
            const int64_t whole[] = {0, all}, offsets[] = {0, tokens, T};
            dsv2_latents(kv_a.data(), C, P, weight.data(), 1e-6f, rotation.data(), tables.data(), blocks + 1, whole, 1,
                         rows.get(), int32_t(dtype));
            tables[0] = cached;
            tables.resize(2 * (blocks + 1));
            std::copy_n(tables.begin(), blocks + 1, tables.begin() + blocks + 1);
            tables[blocks + 1] = cached - more;
            for (int64_t form = 0; form < 4; form++) {
                const int64_t absorb[] = {form % 2, form / 2};
                std::vector<float> out(T * H * V);
                dsv2_attention(numbers(T * H * (N + P)).data(), rotation.data(), rows.get(), int32_t(dtype), tables.data(),
                               blocks + 1, offsets, absorb, 2, &uk.m, &uv.m, 0.1f, H, P, out.data());
                finite("attention", out);
            }
        }
}

// The number under which a function is recorded.
int64_t recordable(const char* name) {
    for (int64_t function = 0; const char* found = dsv2_recordable(function); function++)
        if (!std::strcmp(found, name)) return function;
    std::printf("%s cannot be recorded\n", name);
    std::exit(1);
}

// Replays two recorded calls, a norm and the sum of its result and its input.
void replay() {
    const auto x = numbers(700), weight = numbers(100);
    std::vector<float> normed(700), sum(700);
    const auto word = [](const auto& value) {
        uint64_t bits = 0;
        std::memcpy(&bits, &value, sizeof value);
        return bits;
    };
    const dsv2::Call calls[] = {
        {recordable("rms_norm"), {word(x.data()), 7, 100, word(weight.data()), word(1e-6f), word(normed.data())}},
        {recordable("add"), {word(normed.data()), word(x.data()), 700, word(sum.data())}},
    };
    double seconds[2] = {};
    dsv2_replay(calls, 2, nullptr);
    dsv2_replay(calls, 2, seconds);
    finite("replay", sum);
    if (sum[3] != normed[3] + x[3] || seconds[0] <= 0) std::exit(1);
}

void everything() {
    for (int32_t format : {0, 1}) {
        products(format);
        mixtures(format);
    }
    for (LatentDtype dtype : {LatentDtype::BF16, LatentDtype::INT8}) {
        attention(dtype, 40, 6);
        attention(dtype, 128, 64);
    }
    std::vector<float> y(7 * 100);
    dsv2_rms_norm(numbers(700).data(), 7, 100, numbers(100).data(), 1e-6f, y.data());
    finite("rms_norm", y);
    dsv2_add(numbers(700).data(), y.data(), 700, y.data());
    finite("add", y);
    replay();
    const std::vector<uint8_t> bytes(3'000'001, 1);
    dsv2_read(bytes.data(), int64_t(bytes.size()));
}

}  // namespace

int main() {
    for (int count : {4, 1, 3}) {
        dsv2_set_threads(count, nullptr);
        everything();
    }
    dsv2_set_threads(4, nullptr);
    const Stored weight(256, 256, 0);  // calls from several threads share the pool
    const auto x = numbers(5 * 256);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; i++)
        callers.emplace_back([&] {
            for (int k = 0; k < 50; k++) {
                std::vector<float> y(5 * 256);
                dsv2_linear(x.data(), 5, 1, &weight.m, y.data());
            }
        });
    for (auto& caller : callers) caller.join();
    dsv2_set_threads(1, nullptr);
    std::puts("ok");
}
