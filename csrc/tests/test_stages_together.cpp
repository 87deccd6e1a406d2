#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "check.hpp"
#include "noise.hpp"
#include "stage_run.hpp"
#include "textbook.hpp"

#ifdef USF_PRODUCTS

using namespace usf;
using namespace usf::textbook;

namespace stages_together_test {

// Stages together give what they give one after the other, to the bit, wherever the state is meanwhile.
void test(const Case& c, bool pairs) {
    const std::int64_t rows = c.maps.rows();
    const int channels = c.channels, split = channels / 2, n = channels - split;
    std::vector<std::int64_t> order(channels);
    std::iota(order.begin(), order.end(), 0);
    const Half front(order.data(), split, channels), back(order.data() + split, n, channels);
    const Plain only(split, n, false, c.kernel_height, c.kernel_width);
    const Plain first(n, c.hidden, true, c.kernel_height, c.kernel_width), second(c.hidden, 2 * split, false);
    const std::vector<std::int64_t> index(order.rbegin(), order.rend());
    const std::vector<float> shift = noise(split);
    const Plain map(channels, channels, false), last(channels, channels, false);
    const std::vector<Stage> stages = {
        Product{map.made(pairs).weights()},
        Additive{{front, {only.made(pairs)}}, back, -1},
        Affine{{back, {first.made(pairs), second.made(pairs)}}, front, shift, 1.5f, false},
        Additive{{front, {only.made(pairs)}}, back, 1},
        Reorder{index, noise(channels), noise(channels)},
        Product{last.made(pairs).weights()},
    };
    std::vector<float> before = noise(rows * channels);
    std::vector<BFloat16> rounded(before.size()), result(before.size());
    for (std::size_t i = 0; i < before.size(); ++i) {
        narrow(before[i], rounded[i]);
        before[i] = widen(rounded[i]);
    }
    const auto test_some = [&](std::size_t begin, std::size_t end) {
        StageRun together(channels);
        std::vector<float> expected = before, state(before.size()), log_det(rows), expected_log_det(rows);
        for (std::size_t i = begin; i < end; ++i) {
            StageRun alone(channels);
            alone.add(stages[i]);
            alone.run(expected.data(), expected.data(), c.maps, {}, expected_log_det.data(), 1);
            together.add(stages[i]);
        }
        together.run(before.data(), state.data(), c.maps, {}, log_det.data(), 2);
        CHECK(state == expected && log_det == expected_log_det);
        if (!pairs) return;
        log_det.assign(rows, 0);
        together.run(rounded.data(), result.data(), c.maps, {}, log_det.data(), 2);
        CHECK(log_det == expected_log_det);
        std::vector<BFloat16> nearest(state.size());
        round_to(expected.data(), static_cast<std::int64_t>(expected.size()), nearest.data());
        for (std::size_t i = 0; i < nearest.size(); ++i) CHECK(result[i].bits == nearest[i].bits);
    };
    for (std::size_t begin = 0; begin < stages.size(); ++begin)
        for (std::size_t end = std::max(begin + 1, stages.size() - 1); end <= stages.size(); ++end)
            test_some(begin, end);
}

}  // namespace stages_together_test

int test_stages_together(int, char*[]) {
    using namespace stages_together_test;
    for (const std::int64_t numbers : {numbers_together, std::int64_t{1}}) {
        numbers_together = numbers;
        for (const Case& c : cases) {
            test(c, false);
            if (multiplies_pairs()) test(c, true);
        }
    }
    return failures != 0;
}

#else
int test_stages_together(int, char*[]) {
    return 0;
}
#endif
