#include <vector>

#include "check.hpp"
#include "noise.hpp"
#include "triangle.hpp"

using namespace usf;

namespace triangle_test {

void test(std::int64_t rows, std::int64_t columns, std::int64_t gap, bool upper) {
    const std::int64_t stride = columns + gap;
    const std::vector<float> matrix = noise(rows * stride), diagonal = noise(rows);
    std::vector<float> out(rows * columns, 7.0f);
    copy_triangle(matrix.data(), stride, rows, columns, upper, diagonal.data(), out.data(), 2);
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < columns; ++j) {
            const bool kept = upper ? j > i : j < i;
            CHECK(out[i * columns + j] == (i == j ? diagonal[i] : kept ? matrix[i * stride + j] : 0));
        }
    if (gap > 0) return;
    std::vector<float> in_place = matrix;
    copy_triangle(in_place.data(), stride, rows, columns, upper, diagonal.data(), in_place.data(), 1);
    CHECK(in_place == out);
}

}  // namespace triangle_test

int test_triangle(int, char*[]) {
    using namespace triangle_test;
    for (const bool upper : {false, true})
        for (const int gap : {0, 3}) {
            test(1, 1, gap, upper);
            test(33, 33, gap, upper);
            test(64, 64, gap, upper);
            test(20, 50, gap, upper);
        }
    return failures != 0;
}
