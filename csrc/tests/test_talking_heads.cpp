#include <cmath>
#include <vector>

#include "check.hpp"
#include "noise.hpp"
#include "talking_heads.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace talking_heads_test {

struct Case {
    int images, tokens, heads, width;
    std::vector<float> before = noise(heads * heads, 0.3f), after = noise(heads * heads, 0.3f),
                       bias = noise(heads, 0.1f);

    TalkingHeads mixing() const { return {tokens, heads, width, before.data(), after.data(), bias.data()}; }
    int rows() const { return images * tokens; }
    int channels() const { return heads * width; }
};

// to[g] = sum over h of weights[g, h] from[h], for arrays.
using Arrays = std::vector<std::vector<double>>;
Arrays mixed(const std::vector<float>& weights, const Arrays& from) {
    Arrays to(from.size(), std::vector<double>(from[0].size()));
    for (std::size_t g = 0; g < from.size(); ++g)
        for (std::size_t h = 0; h < from.size(); ++h)
            for (std::size_t n = 0; n < from[0].size(); ++n)
                to[g][n] += weights[g * from.size() + h] * from[h][n];
    return to;
}

// As the equations are written, a query at a time.
template <class T>
std::vector<double> expected(const Case& of, const std::vector<T>& qkv) {
    const int channels = of.channels();
    const auto at = [&](int row, int part, int h, int c) {
        return double(widen(qkv[(row * 3 + part) * channels + h * of.width + c]));
    };
    std::vector<double> out(of.rows() * channels);
    for (int row = 0; row < of.rows(); ++row) {
        const int first = row / of.tokens * of.tokens;
        Arrays scores(of.heads, std::vector<double>(of.tokens));
        for (int h = 0; h < of.heads; ++h)
            for (int n = 0; n < of.tokens; ++n)
                for (int c = 0; c < of.width; ++c) scores[h][n] += at(row, 0, h, c) * at(first + n, 1, h, c);
        Arrays shares = mixed(of.before, scores);
        for (std::vector<double>& head : shares) {
            const double largest = *std::max_element(head.begin(), head.end());
            double total = 0;
            for (double& x : head) total += x = std::exp2(x - largest);
            for (double& x : head) x /= total;
        }
        shares = mixed(of.after, shares);
        for (int h = 0; h < of.heads; ++h)
            for (int c = 0; c < of.width; ++c)
                for (int n = 0; n < of.tokens; ++n)
                    out[row * channels + h * of.width + c] +=
                        (shares[h][n] + of.bias[h]) * at(first + n, 2, h, c);
    }
    return out;
}

template <class T>
std::vector<T> found(const Case& of, const std::vector<T>& qkv, int threads) {
    std::vector<T> out(of.rows() * of.channels());
    for (T& value : out) narrow(NAN, value);
    talking_heads(of.mixing(), qkv.data(), of.images, out.data(), threads);
    return out;
}

template <class T>
void test(const Case& of, double tolerance) {
    const std::vector<T> qkv = noise<T>(of.rows() * 3 * of.channels());
    const std::vector<T> out = found(of, qkv, 1), again = found(of, qkv, 3);
    const std::vector<double> truth = expected(of, qkv);
    double squares = 0, errors = 0;
    bool same = true;
    for (std::size_t i = 0; i < out.size(); ++i) {
        squares += truth[i] * truth[i];
        errors += std::pow(widen(out[i]) - truth[i], 2);
        same = same && widen(out[i]) == widen(again[i]);
    }
    CHECK(std::sqrt(errors / squares) <= tolerance);
    CHECK(same);
}

// A score far above the others leaves one key; NaN stays in its image.
void test_extremes() {
    const Case of{2, 20, 1, 4, {1}, {1}, {0}};
    std::vector<float> qkv(of.rows() * 12, 0.0f);
    for (int row = 0; row < of.rows(); ++row) {
        qkv[row * 12] = 1, qkv[row * 12 + 4] = row % 20 == 3 ? 5000.0f : -5000.0f;
        for (int c = 0; c < 4; ++c) qkv[row * 12 + 8 + c] = static_cast<float>(row);
    }
    std::vector<float> out = found(of, qkv, 1);
    for (int i = 0; i < 160; ++i) CHECK(std::abs(out[i] - (i < 80 ? 3 : 23)) <= 1e-5);
    qkv[21 * 12 + 4] = NAN;
    out = found(of, qkv, 1);
    for (int i = 0; i < 160; ++i) CHECK(i < 80 ? std::abs(out[i] - 3) <= 1e-5 : std::isnan(out[i]));
}

}  // namespace talking_heads_test

int test_talking_heads(int, char*[]) {
    using namespace talking_heads_test;
    test_extremes();
    for (const int lanes : {16, 8, 4}) {
        most_lanes = lanes;
        for (const int tokens : {1, 15, 16, 33, 66})
            for (const int heads : {1, 3, 4, 9}) test<float>({2, tokens, heads, 7}, 1e-6);
        test<float>({1, 25, 2, 48}, 1e-6);
    }
    most_lanes = 16;
    if (!multiplies_pairs() || has_amx()) return failures != 0;
    for (const int tokens : {1, 15, 16, 33, 66})
        for (const int heads : {1, 3, 4, 9})
            for (const int width : {16, 48}) test<BFloat16>({2, tokens, heads, width}, 6e-3);
    return failures != 0;
}

#else

int test_talking_heads(int, char*[]) {
    return 0;
}

#endif
