// log10 Pr(s * chi2_nu >= t): the Chernoff bound, and the exact value, even where the probability underflows.
//
// Both start from the same term. With a = nu / 2, x = t / (2 s) and lambda = x / a,
//     Q(a, x) = Gamma(a, x) / Gamma(a) = exp(a (1 + ln lambda - lambda)) * correction,
// the exponential being the Chernoff bound; the correction never leaves the range of a double.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <stdexcept>
#include <vector>

namespace usf {

// Remainder of Stirling's formula: ln Gamma(a) - ((a - 1/2) ln a - a + ln(2 pi) / 2).
inline double stirling_remainder(double a) {
    double shift = 0;
    for (; a < 16; a += 1) shift += (a + 0.5) * std::log1p(1 / a) - 1;
    const double s = 1 / (a * a);
    return shift + (1.0 / 12 - s * (1.0 / 360 - s * (1.0 / 1260 - s * (1.0 / 1680 - s / 1188)))) / a;
}

// a (1 + ln lambda - lambda), the natural log of the Chernoff bound; written so as not to cancel near 1.
inline double log_chernoff(double a, double lambda) {
    if (std::isinf(lambda)) return -lambda;
    const double d = lambda - 1;
    return a * (std::abs(d) < 0.5 ? std::log1p(d) - d : 1 + std::log(lambda) - lambda);
}

// ln Q(a, a lambda), the regularised upper incomplete gamma function, for a > 0 and lambda >= 0. For lambda
// near 1 it takes time proportional to sqrt(a).
inline double log_upper_gamma(double a, double lambda) {
    if (lambda <= 0) return 0;
    constexpr double epsilon = std::numeric_limits<double>::epsilon();
    const double x = a * lambda;
    if (std::isinf(x)) return -x;
    const double log_prefactor = log_chernoff(a, lambda) - stirling_remainder(a) +
                                 0.5 * std::log(a / (2 * std::numbers::pi));  // ln(x^a e^-x / Gamma(a))
    if (x < a + 1) {  // the lower function by its power series, then the complement
        double term = 1 / a, sum = term;
        for (double n = a + 1; term > sum * (epsilon / 4); n += 1) sum += term *= x / n;
        return std::log1p(-std::exp(log_prefactor) * sum);
    }
    // Legendre's continued fraction, by Lentz's method; every partial numerator with n < a is positive.
    double b = x + 1 - a, c = 1 / std::numeric_limits<double>::min(), d = 1 / b, fraction = d;
    for (double n = 1;; n += 1) {
        const double numerator = n * (a - n);
        b += 2;
        d = 1 / (numerator * d + b);
        c = numerator / c + b;
        const double factor = c * d;
        fraction *= factor;
        if (std::abs(factor - 1) < 2 * epsilon || n > 1e7) break;
    }
    return log_prefactor + std::log(fraction);
}

enum class TailKind : int { chernoff = 0, exact = 1 };

// The tail of scale * chi2_dof as a function of the level. The exact one costs hundreds of operations per
// value, so the constructor tabulates it: Chebyshev polynomials on intervals that are equal fractions of an
// octave of 1 + sqrt(max(1, a)) |lambda - 1|, so that the top of a double's bits is an interval's index.
class Tail {
public:
    static constexpr double largest_dof = 1e9;  // the table for it takes a fifth of a second

    Tail(double dof, double scale, TailKind kind) : a_(dof / 2), mean_(dof * scale), kind_(kind) {
        if (!(dof > 0 && dof <= largest_dof && scale > 0 && std::isnormal(a_) && std::isnormal(mean_))) {
            throw std::invalid_argument(
                "dof, scale: expected positive numbers, dof at most 1e9, that neither vanish nor overflow "
                "when multiplied");
        }
        if (kind == TailKind::chernoff) return;
        root_a_ = std::sqrt(std::max(1.0, a_));
        above_ = tabulate(1 + 63 * root_a_, +1);
        // Further below the mean the series is short, and near 0 no polynomial follows x^a for small a.
        below_ = tabulate(1 + std::min(8.0, 0.5 * root_a_), -1);
    }

    TailKind kind() const { return kind_; }

    // log10 Pr(X >= t), at most 0; -inf where it exceeds the range of a double.
    double operator()(double t) const { return kind_ == TailKind::chernoff ? chernoff(t) : exact(t); }

    double chernoff(double t) const {  // no bound at and below the mean
        const double lambda = t / mean_;
        return lambda <= 1 ? 0 : std::min(0.0, log_chernoff(a_, lambda) * log10e);
    }

    double exact(double t) const {
        const double d = t / mean_ - 1;
        const std::vector<Piece>& pieces = d >= 0 ? above_ : below_;
        const std::uint64_t bits = std::bit_cast<std::uint64_t>(1 + root_a_ * std::abs(d));
        const std::uint64_t index = (bits >> shift) - first;
        if (index >= pieces.size()) return log_upper_gamma(a_, t / mean_) * log10e;
        const double y = static_cast<double>(static_cast<std::int64_t>(bits & mask)) * half_width - 1;
        const double* c = pieces[index].c;
        double p = c[degree], q = 0;  // Clenshaw's recurrence
        for (int k = degree - 1; k > 0; --k) {
            const double next = 2 * y * p - q + c[k];
            q = p, p = next;
        }
        return std::min(0.0, y * p - q + c[0]);
    }

private:
    static constexpr int degree = 7, shift = 52 - 3;  // eight intervals per octave
    static constexpr std::uint64_t first = std::bit_cast<std::uint64_t>(1.0) >> shift;
    static constexpr std::uint64_t mask = (std::uint64_t{1} << shift) - 1;
    static constexpr double half_width = 2.0 / static_cast<double>(std::uint64_t{1} << shift);
    static constexpr double log10e = std::numbers::log10e;

    struct Piece {
        double c[degree + 1];
    };

    std::vector<Piece> tabulate(double end, int side) const {
        const std::uint64_t count = (std::bit_cast<std::uint64_t>(end) >> shift) - first;
        std::vector<Piece> pieces(count);
        constexpr int n = degree + 1;
        for (std::uint64_t i = 0; i < count; ++i) {
            const double low = std::bit_cast<double>((first + i) << shift);
            const double high = std::bit_cast<double>((first + i + 1) << shift);
            double f[n];
            for (int j = 0; j < n; ++j) {
                const double y = std::cos(std::numbers::pi * (j + 0.5) / n);
                const double v = low + (high - low) * (y + 1) / 2;
                f[j] = log_upper_gamma(a_, 1 + side * (v - 1) / root_a_) * log10e;
            }
            for (int k = 0; k < n; ++k) {
                double sum = 0;
                for (int j = 0; j < n; ++j) sum += f[j] * std::cos(std::numbers::pi * k * (j + 0.5) / n);
                pieces[i].c[k] = sum * (k ? 2.0 : 1.0) / n;
            }
        }
        return pieces;
    }

    double a_, mean_, root_a_ = 0;
    TailKind kind_;
    std::vector<Piece> above_, below_;
};

}  // namespace usf
