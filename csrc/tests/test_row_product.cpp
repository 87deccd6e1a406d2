#include <cmath>
#include <vector>

#include "check.hpp"
#include "noise.hpp"
#include "row_product.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace row_product_test {

// Against sums in float64, of a matrix with gaps between its rows.
void test(std::int64_t images, std::int64_t positions, int outputs, int inputs, int threads) {
    const std::int64_t rows = images * positions, gap = inputs + 3, turned_gap = outputs + 5;
    const auto matrix = noise(outputs * gap, 1 / std::sqrt(float(inputs)));
    const auto bias = noise(outputs), share = noise(positions * outputs), mask = noise(rows * outputs);
    const auto in = noise(rows * inputs);
    std::vector<float> turned(inputs * turned_gap, NAN);
    for (int o = 0; o < outputs; ++o)
        for (int c = 0; c < inputs; ++c) turned[c * turned_gap + o] = matrix[o * gap + c];
    const auto product = [&](const MatrixView& view, const float* shift, Ending ending,
                             const Condition* beside) {
        std::vector<float> out(rows * outputs, NAN);
        row_product(view, shift, outputs, inputs, ending, Inputs{in.data(), inputs},
                    Call{{images, positions, 1}, threads, beside}, out.data());
        return out;
    };
    const MatrixView straight{matrix.data(), gap, false}, transposed{turned.data(), turned_gap, true};
    const Condition shared{share.data(), 1, outputs}, masking{mask.data(), images, outputs};
    const auto plain = product(straight, nullptr, Ending::plain, nullptr),
               again = product(transposed, nullptr, Ending::plain, nullptr),
               masked = product(transposed, nullptr, Ending::masked, &masking),
               full = product(straight, bias.data(), Ending::relu, &shared);
    CHECK(plain == again);
    for (std::int64_t r = 0; r < rows; ++r)
        for (int o = 0; o < outputs; ++o) {
            double sum = 0;
            for (int c = 0; c < inputs; ++c) sum += double(matrix[o * gap + c]) * in[r * inputs + c];
            const std::size_t at = r * outputs + o;
            CHECK(std::abs(plain[at] - sum) <= 4e-6);
            CHECK(masked[at] == (mask[at] > 0 ? plain[at] : 0));
            const double shifted = sum + bias[o] + share[r % positions * outputs + o];
            CHECK(std::abs(full[at] - std::max(shifted, 0.0)) <= 4e-6);
        }
}

}  // namespace row_product_test

int test_row_product(int, char*[]) {
    using namespace row_product_test;
    for (most_lanes = 4; most_lanes <= 16; most_lanes *= 2) {
        test(1, 64, 32, 16, 1);
        test(3, 63, 37, 43, 2);
        test(2, 1, 1, 5, 3);
        test(1, 700, 50, 1, 2);
        test(2, 33, 64, 300, 2);
        test(0, 9, 4, 4, 2);
        test(2, 0, 4, 4, 2);
        test(5, 16, 20, 100, 4);
        test(3, 21, 150, 70, 1);  // panel after panel
        test(2, 17, 300, 40, 2);
    }
    return failures != 0;
}

#else
int test_row_product(int, char*[]) {
    return 0;
}
#endif
