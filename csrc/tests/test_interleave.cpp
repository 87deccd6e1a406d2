#include <cstdio>
#include <random>
#include <vector>

#include "check.hpp"
#include "interleave.hpp"
#include "noise.hpp"
#include "vectors.hpp"

using namespace usf;

namespace interleave_test {

// Against the definition, with memory around the result that must stay as it is.
template <class From, class To>
void test_shape(std::int64_t images, std::int64_t channels, std::int64_t positions, int threads) {
    const std::int64_t apart = channels * positions + 5;
    const auto maps = noise<From>(images * apart);
    constexpr std::size_t margin = 64;
    std::vector<To> rows(images * channels * positions + 2 * margin);
    for (To& value : rows) narrow(7.0f, value);
    interleave(maps.data(), apart, images, channels, positions, rows.data() + margin, threads);
    std::size_t wrong = 0;
    for (std::int64_t b = 0; b < images; ++b)
        for (std::int64_t c = 0; c < channels; ++c)
            for (std::int64_t p = 0; p < positions; ++p) {
                To expected;
                narrow(widen(maps[b * apart + c * positions + p]), expected);
                const To found = rows[margin + (b * positions + p) * channels + c];
                wrong += widen(found) != widen(expected);
            }
    for (std::size_t i = 0; i < margin; ++i)
        wrong += widen(rows[i]) != 7.0f || widen(rows[rows.size() - 1 - i]) != 7.0f;
    if (wrong == 0) return;
    std::printf("%d x %d x %d: %d wrong\n", int(images), int(channels), int(positions), int(wrong));
    ++failures;
}

// What machines without the widest registers run.
template <class Transpose>
void test_tile(const Transpose& transpose, int channels, int positions) {
    const auto maps = noise<float>(channels * 20);
    std::vector<float> rows(positions * (channels + 1), 7.0f);
    transpose(maps.data(), 20, channels, positions, rows.data(), channels + 1);
    for (int p = 0; p < positions; ++p) {
        for (int c = 0; c < channels; ++c) failures += rows[p * (channels + 1) + c] != maps[c * 20 + p];
        failures += rows[p * (channels + 1) + channels] != 7.0f;
    }
}
void test_tiles() {
    for (int channels = 0; channels <= tile; ++channels)
        for (int positions = 0; positions <= tile; ++positions) {
            test_tile(transpose_plain<float, float>, channels, positions);
#ifdef USF_AVX2
            if (best_lanes() >= 8) test_tile(transpose_eights, channels, positions);
#endif
        }
}

}  // namespace interleave_test

int test_interleave(int, char*[]) {
    using namespace interleave_test;
    for (const std::int64_t channels : {1, 2, 15, 16, 17, 33, 64, 100})
        for (const std::int64_t positions : {1, 5, 16, 31, 64, 65, 200})
            for (const int threads : {1, 3}) {
                test_shape<float, float>(2, channels, positions, threads);
                test_shape<float, BFloat16>(1, channels, positions, threads);
                test_shape<BFloat16, BFloat16>(3, channels, positions, threads);
            }
    test_shape<float, float>(0, 3, 4, 2);
    test_tiles();
    if (failures == 0) std::printf("interleave: all passed\n");
    return failures != 0;
}
