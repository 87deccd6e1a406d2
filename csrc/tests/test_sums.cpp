#include <cmath>
#include <vector>

#include "check.hpp"
#include "noise.hpp"
#include "sums.hpp"

using namespace usf;

namespace sums_test {

// Of maps and of rows, with gaps, against sums in float64.
void test(std::int64_t batch, std::int64_t channels, std::int64_t positions) {
    const Extent extent{batch, channels, positions};
    const std::int64_t gap = 3, row = channels + gap, map = positions + gap;
    const Input maps{nullptr, channels * map + gap, map, 1}, rows{nullptr, positions * row + gap, 1, row};
    for (Input z : {maps, rows}) {
        const std::vector<float> values = noise(batch * z.batch + 1);
        z.data = values.data();
        std::vector<float> sums(channels, NAN), again(channels, NAN);
        CHECK(channel_sums(z, extent, sums.data(), 1));
        CHECK(channel_sums(z, extent, again.data(), 3));
        CHECK(sums == again);
        for (std::int64_t c = 0; c < channels; ++c) {
            double sum = 0, size = 0;
            for (std::int64_t image = 0; image < batch; ++image)
                for (std::int64_t p = 0; p < positions; ++p)
                    sum += *z.at(image, c, p), size += std::abs(*z.at(image, c, p));
            CHECK(std::abs(sums[c] - sum) <= 1e-6 * size + 1e-7);
        }
    }
}

}  // namespace sums_test

int test_sums(int, char*[]) {
    using namespace sums_test;
    test(1, 1, 1);
    test(2, 5, 33);
    test(1, 40, 4100);
    test(3, 7, 9000);
    test(5, 300, 1);
    test(2, 600, 100);
    const std::vector<float> values(4);
    float sum = NAN;
    CHECK(!channel_sums({values.data(), 0, 2, 2}, {1, 2, 2}, &sum, 1));
    CHECK(std::isnan(sum));
    CHECK(channel_sums({values.data(), 0, 0, 1}, {0, 1, 4}, &sum, 2) && sum == 0);
    return failures != 0;
}
