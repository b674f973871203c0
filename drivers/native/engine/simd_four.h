// Sixteen lanes as four vectors of 16 bytes.
#pragma once

template <typename T> struct Four { T a, b, c, d; };

// f of each of the four, and of those that lie beside it.
template <typename F, typename... T> static inline auto each(F f, const Four<T> &...x) -> Four<decltype(f(x.a...))> {
    return {f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
}
