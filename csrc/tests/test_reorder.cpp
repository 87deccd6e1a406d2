#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "check.hpp"
#include "half.hpp"
#include "noise.hpp"
#include "reorder.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace reorder_test {

// Against the definition, with rows around it that must stay as they are.
void test(int channels, int rows) {
    std::vector<std::int64_t> index(channels);
    std::iota(index.begin(), index.end(), 0);
    std::shuffle(index.begin(), index.end(), random_bits);
    const std::vector<float> scale = noise(channels), bias = noise(channels);
    const std::vector<float> before = noise((rows + 2) * channels);
    std::vector<float> after = before;
    Floats memory;
    const Reorder reorder(index, scale, bias);
    reorder.apply(after.data() + channels, rows, memory);
    for (int j = 0; j < channels; ++j) {
        CHECK(after[j] == before[j]);
        CHECK(after[(rows + 1) * channels + j] == before[(rows + 1) * channels + j]);
    }
    for (int r = 1; r <= rows; ++r)
        for (int j = 0; j < channels; ++j) {
            const double expected = double(scale[j]) * before[r * channels + index[j]] + bias[j];
            CHECK(std::abs(after[r * channels + j] - expected) <= 1e-6 * (1 + std::abs(expected)));
        }
    if (!multiplies_pairs()) return;
    std::vector<float> state = before;
    std::vector<BFloat16> rounded((rows + 1) * channels, BFloat16{7}), nearest(rows * channels);
    reorder.apply(state.data() + channels, rows, memory, rounded.data());
    round_to(after.data() + channels, rows * channels, nearest.data());
    for (int i = 0; i < rows * channels; ++i) CHECK(rounded[i].bits == nearest[i].bits);
    for (int j = 0; j < channels; ++j) CHECK(rounded[rows * channels + j].bits == 7);
}

}  // namespace reorder_test

int test_reorder(int, char*[]) {
    using namespace reorder_test;
    for (most_lanes = 4; most_lanes <= 16; most_lanes *= 2)
        for (const int channels : {1, 5, 16, 32, 33, 64, 96, 112, 128, 131, 144, 256, 400})
            for (const int rows : {0, 1, 15, 16, 17, 96}) test(channels, rows);
    for (const std::int64_t wrong :
         {std::int64_t{-1}, std::int64_t{3}, std::int64_t{1} << 30, std::int64_t{1} << 32}) {
        CHECK_THROWS(Reorder({0, wrong, 2}, noise(3), noise(3)));
        const std::int64_t index[] = {0, wrong};
        CHECK_THROWS(Half(index, 2, 3));
    }
    CHECK_THROWS(Reorder({0, 1}, noise(2), noise(3)));
    CHECK_THROWS(Reorder({0, 1, 1}, noise(3), noise(3)));
    const std::int64_t twice[] = {1, 1};
    CHECK_THROWS(Half(twice, 2, 3));
    return failures != 0;
}

#else
int test_reorder(int, char*[]) {
    return 0;
}
#endif
