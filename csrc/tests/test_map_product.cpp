#include <cmath>
#include <vector>

#include "check.hpp"
#include "map_product.hpp"
#include "noise.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace map_product_test {

bool in(Triangle part, int row, int column) {
    return part == Triangle::whole || (part == Triangle::lower ? column <= row : column >= row);
}

// The same maps with channels side by side: `next` numbers from one position to the next.
std::vector<float> as_rows(const MapView& x, std::int64_t images, int channels, std::int64_t positions,
                           std::int64_t next) {
    std::vector<float> rows(images * positions * next, NAN);
    for (std::int64_t image = 0; image < images; ++image)
        for (std::int64_t p = 0; p < positions; ++p)
            for (int c = 0; c < channels; ++c)
                rows[(image * positions + p) * next + c] = x.data[image * x.image + c * x.next + p];
    return rows;
}

// Against sums in float64, of maps with gaps between channels and images.
void test(Triangle part, std::int64_t images, int outputs, int inputs, std::int64_t positions, int threads) {
    auto matrix = noise(std::size_t{1} * outputs * inputs, 1 / std::sqrt(float(inputs)));
    for (int o = 0; o < outputs; ++o)
        for (int c = 0; c < inputs; ++c)
            if (!in(part, o, c)) matrix[o * inputs + c] = 0;
    const auto bias = noise(outputs), mask = noise(images * outputs * positions);
    const std::int64_t gap = positions + 3, x_image = gap * inputs + 5, a_image = gap * outputs + 7;
    const auto x = noise(images * x_image),
               a = noise(images * a_image, 1 / std::sqrt(1.0f + images * positions));
    const MapView of_x{x.data(), x_image, gap}, of_a{a.data(), a_image, gap};
    std::vector<float> transposed(matrix.size());
    for (int o = 0; o < outputs; ++o)
        for (int c = 0; c < inputs; ++c) transposed[c * outputs + o] = matrix[o * inputs + c];
    const auto product = [&](bool turned, const float* shift, Ending ending) {
        std::vector<float> y(images * outputs * positions, NAN);
        const MatrixView view{turned ? transposed.data() : matrix.data(), turned ? outputs : inputs, turned};
        map_product(view, part, outputs, inputs, of_x, images, positions, shift, ending,
                    ending == Ending::masked ? mask.data() : nullptr, y.data(), threads);
        return y;
    };
    const auto plain = product(false, bias.data(), Ending::plain),
               relu = product(true, bias.data(), Ending::relu);
    const auto bare = product(true, nullptr, Ending::plain), masked = product(true, nullptr, Ending::masked);
    for (std::int64_t image = 0; image < images; ++image)
        for (int o = 0; o < outputs; ++o)
            for (std::int64_t p = 0; p < positions; ++p) {
                double sum = 0;
                for (int c = 0; c < inputs; ++c)
                    sum += double(matrix[o * inputs + c]) * x[image * x_image + c * gap + p];
                const std::size_t at = (image * outputs + o) * positions + p;
                CHECK(std::abs(bare[at] - sum) <= 4e-6);
                CHECK(masked[at] == (mask[at] > 0 ? bare[at] : 0));
                CHECK(std::abs(plain[at] - (sum + bias[o])) <= 4e-6);
                CHECK(relu[at] == std::max(plain[at], 0.0f));
            }
    const std::int64_t next = std::max(inputs, outputs) + 3;
    const auto rows_of_x = as_rows(of_x, images, inputs, positions, next),
               rows_of_a = as_rows(of_a, images, outputs, positions, next);
    const MapView as[] = {of_a, {rows_of_a.data(), positions * next, next, true}},
                  xs[] = {of_x, {rows_of_x.data(), positions * next, next, true}};
    std::vector<double> sums(matrix.size());
    for (int o = 0; o < outputs; ++o)
        for (int c = 0; c < inputs; ++c)
            for (std::int64_t image = 0; image < images; ++image)
                for (std::int64_t p = 0; p < positions; ++p)
                    sums[o * inputs + c] +=
                        double(a[image * a_image + o * gap + p]) * x[image * x_image + c * gap + p];
    for (const MapView& a_view : as)
        for (const MapView& x_view : xs) {
            std::vector<float> outer(matrix.size(), NAN), again = outer;
            for (auto* result : {&outer, &again})
                outer_product({a_view, x_view, part, outputs, inputs}, images, positions, result->data(),
                              threads);
            for (int o = 0; o < outputs; ++o)
                for (int c = 0; c < inputs; ++c) {
                    if (!in(part, o, c)) continue;
                    CHECK(std::abs(outer[o * inputs + c] - sums[o * inputs + c]) <= 4e-6);
                    CHECK(outer[o * inputs + c] == again[o * inputs + c]);
                }
        }
}

}  // namespace map_product_test

int test_map_product(int, char*[]) {
    using namespace map_product_test;
    for (most_lanes = 4; most_lanes <= 16; most_lanes *= 2) {
        for (const Triangle part : {Triangle::whole, Triangle::lower, Triangle::upper}) {
            test(part, 1, 16, 16, 64, 1);
            test(part, 3, 37, 43, 63, 2);
            test(part, 2, 1, 5, 1, 3);
            test(part, 1, 50, 1, 700, 2);
            test(part, 2, 64, 300, 33, 2);
            test(part, 1, 130, 130, 40, 2);
            test(part, 0, 4, 4, 9, 2);
            test(part, 2, 4, 4, 0, 2);
            test(part, 5, 100, 20, 16, 4);
            test(part, 2, 211, 230, 300, 2);
        }
    }
    return failures != 0;
}

#else
int test_map_product(int, char*[]) {
    return 0;
}
#endif
