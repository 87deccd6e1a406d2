#include <cmath>
#include <vector>

#include "check.hpp"
#include "inverse.hpp"
#include "noise.hpp"

using namespace usf;

namespace inverse_test {

// Product of triangles that are not far from ones, as those of LU maps.
std::vector<float> matrix(std::int64_t n) {
    const std::vector<float> l = noise(n * n), u = noise(n * n + 1);
    const double scale = 1 / std::sqrt(static_cast<double>(n));
    std::vector<float> m(n * n);
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < n; ++j) {
            double total = 0;
            for (std::int64_t k = 0; k <= std::min(i, j); ++k)
                total += (k < i ? scale * l[i * n + k] : 1) * (k < j ? scale * u[k * n + j] : 1 + k % 3);
            m[i * n + j] = static_cast<float>(total);
        }
    return m;
}

void test(std::int64_t n) {
    const std::vector<float> m = matrix(n);
    std::vector<float> x(n * n, NAN), again = x;
    CHECK(invert(m.data(), n, x.data(), 1));
    CHECK(invert(m.data(), n, again.data(), 3));
    CHECK(x == again);
    double worst = 0, largest = 0;
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < n; ++j) {
            double total = i == j ? -1 : 0, size = 0;
            for (std::int64_t k = 0; k < n; ++k) {
                total += static_cast<double>(m[i * n + k]) * x[k * n + j];
                size += std::abs(static_cast<double>(m[i * n + k]) * x[k * n + j]);
            }
            worst = std::max(worst, std::abs(total));
            largest = std::max(largest, size);
        }
    CHECK(worst <= 6e-8 * largest);  // of rounding to float32
}

}  // namespace inverse_test

int test_inverse(int, char*[]) {
    using namespace inverse_test;
    for (const int lanes : {16, 8, 4}) {
        most_lanes = lanes;
        for (const int n : {1, 2, 15, 16, 17, 33, 48, 100, 130}) test(n);
    }
    most_lanes = 16;
    const std::vector<float> exchanged = {0, 1, 1, 0}, singular = {1, 1, 1, 1}, none(4, NAN);
    for (const auto& m : {exchanged, singular, none}) {
        std::vector<float> x(4, 7.0f);
        CHECK(!invert(m.data(), 2, x.data(), 1));
        CHECK(x == std::vector<float>(4, 7.0f));
    }
    return failures != 0;
}
