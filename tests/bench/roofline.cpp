// What this machine can do: memory read bandwidth, and multiply-add peaks from registers.
// One JSON object on standard output. Build: g++ -O3 -march=native -pthread roofline.cpp
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

using Clock = std::chrono::steady_clock;

static double since(Clock::time_point begun) {
    return std::chrono::duration<double>(Clock::now() - begun).count();
}

// Runs `work(thread)` on `threads` threads at once; seconds until the last is done.
template <class Work> static double together(int threads, Work work) {
    std::atomic<int> ready{0};
    std::vector<std::thread> all;
    std::atomic<bool> go{false};
    for (int i = 0; i < threads; i++)
        all.emplace_back([&, i] {
            ready++;
            while (!go) std::this_thread::yield();
            work(i);
        });
    while (ready < threads) std::this_thread::yield();
    auto begun = Clock::now();
    go = true;
    for (auto &one : all) one.join();
    return since(begun);
}

static volatile int64_t sink;
typedef int64_t words __attribute__((vector_size(64)));

static int64_t read_all(const char *data, size_t size) {
    words sum[4] = {};
    for (size_t at = 0; at + 256 <= size; at += 256)
        for (int k = 0; k < 4; k++) sum[k] += *(const words *)(data + at + 64 * k);
    sum[0] += sum[1] + sum[2] + sum[3];
    int64_t total = 0;
    for (int k = 0; k < 8; k++) total += sum[0][k];
    return total;
}

// Twelve independent sums, so that the latency of one is hidden behind the others. They are twelve variables,
// as compilers keep the elements of an array in memory.
constexpr int CHAINS = 12;
constexpr long ROUNDS = 400'000;  // a few milliseconds: somewhere among many tries nobody else runs
#if defined(__aarch64__)
#define KEEP(x) __asm__ volatile("" : "+w"(x))
#elif defined(__x86_64__)
#define KEEP(x) __asm__ volatile("" : "+v"(x))
#endif
#define EACH(X) X(s0) X(s1) X(s2) X(s3) X(s4) X(s5) X(s6) X(s7) X(s8) X(s9) X(s10) X(s11)
#define MAKE(s) auto s = start;
#define STEP(s) s = next(s); KEEP(s);
#define USE(s) memcpy(&out, &s, sizeof out), sink = out;

template <class Sum, class Next> [[gnu::always_inline]] static inline void chains(Sum start, Next next) {
    EACH(MAKE)
    for (long r = 0; r < ROUNDS; r++) {
        EACH(STEP)
    }
    int64_t out;
    EACH(USE)
}

// Each returns multiply-adds a round and chain.
static int int8_kernel(int seed) {
#if defined(__AVX512VNNI__)
    __m512i a = _mm512_set1_epi8(seed), b = _mm512_set1_epi8(seed + 1);
    chains(_mm512_setzero_si512(), [&](auto sum) { return _mm512_dpbusd_epi32(sum, a, b); });
    return 64;
#elif defined(__AVXVNNI__)
    __m256i a = _mm256_set1_epi8(seed), b = _mm256_set1_epi8(seed + 1);
    chains(_mm256_setzero_si256(), [&](auto sum) { return _mm256_dpbusd_avx_epi32(sum, a, b); });
    return 32;
#elif defined(__AVX2__)
    __m256i a = _mm256_set1_epi8(seed), b = _mm256_set1_epi8(seed + 1), ones = _mm256_set1_epi16(1);
    chains(_mm256_setzero_si256(), [&](auto sum) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_xor_si256(a, sum), b);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    });
    return 32;
#elif defined(__ARM_FEATURE_DOTPROD)
    int8x16_t a = vdupq_n_s8(seed), b = vdupq_n_s8(seed + 1);
    chains(vdupq_n_s32(0), [&](auto sum) { return vdotq_s32(sum, a, b); });
    return 16;
#else
    return 0;
#endif
}

static int bf16_kernel(int seed) {
#if defined(__AVX512BF16__)
    __m512bh a, b;
    memset(&a, seed, sizeof a);
    memset(&b, seed, sizeof b);
    chains(_mm512_setzero_ps(), [&](auto sum) { return _mm512_dpbf16_ps(sum, a, b); });
    return 32;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    bfloat16x8_t a, b;
    memset(&a, seed, sizeof a);
    memset(&b, seed, sizeof b);
    chains(vdupq_n_f32(0), [&](auto sum) { return vbfmmlaq_f32(sum, a, b); });
    return 16;
#else
    return 0;
#endif
}

static int fp32_kernel(int seed) {
#if defined(__AVX512F__)
    __m512 a = _mm512_set1_ps(seed * 1e-9f), b = _mm512_set1_ps(1.0f);
    chains(_mm512_setzero_ps(), [&](auto sum) { return _mm512_fmadd_ps(a, b, sum); });
    return 16;
#elif defined(__FMA__)
    __m256 a = _mm256_set1_ps(seed * 1e-9f), b = _mm256_set1_ps(1.0f);
    chains(_mm256_setzero_ps(), [&](auto sum) { return _mm256_fmadd_ps(a, b, sum); });
    return 8;
#elif defined(__aarch64__)
    float32x4_t a = vdupq_n_f32(seed * 1e-9f), b = vdupq_n_f32(1.0f);
    chains(vdupq_n_f32(0), [&](auto sum) { return vfmaq_f32(sum, a, b); });
    return 4;
#else
    return 0;
#endif
}

static double peak(int threads, int (*kernel)(int)) {
    double best = 0;
    int width = 0;
    for (int round = 0; round < 40; round++) {
        double seconds = together(threads, [&](int) { width = kernel(3); });
        double rate = 2.0 * width * CHAINS * ROUNDS * threads / seconds;
        if (rate > best) best = rate;
    }
    return best;
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 2;
    size_t size = size_t(256) << 20;
    std::vector<char *> data;
    for (int i = 0; i < threads; i++) {
        data.push_back((char *)aligned_alloc(4096, size));
        memset(data.back(), i + 1, size);
    }
    auto bandwidth = [&](int users) {
        double best = 0;
        for (int round = 0; round < 20; round++) {
            double seconds = together(users, [&](int i) { sink = read_all(data[i], size); });
            double rate = double(size) * users / seconds;
            if (rate > best) best = rate;
        }
        return best;
    };
    printf("{\"read_1\": %.4g, \"read_n\": %.4g, ", bandwidth(1), bandwidth(threads));
    printf("\"int8\": %.4g, \"bf16\": %.4g, \"fp32\": %.4g, \"threads\": %d}\n", peak(threads, int8_kernel),
           peak(threads, bf16_kernel), peak(threads, fp32_kernel), threads);
}
