// Activations and their gradients. Templates over the value type V; see math/philox.h for how these files are
// included.

template <class V>
FASTELBO_INLINE V sigmoid(V x) {
  return V(1.0f) / (V(1.0f) + exp(-x));
}

// NaN stays NaN.
template <class V>
FASTELBO_INLINE V relu(V x) {
  return select(x < V(0.0f), V(0.0f), x);
}
template <class V>
FASTELBO_INLINE V elu(V x) {
  return select(x > V(0.0f), x, expm1(x));
}

// Of relu and elu, from the result y.
template <class V>
FASTELBO_INLINE V relu_gradient(V y, V upstream) {
  return select(y > V(0.0f), upstream, V(0.0f));
}
template <class V>
FASTELBO_INLINE V elu_gradient(V y, V upstream) {
  return select(y > V(0.0f), upstream, upstream * (y + V(1.0f)));
}

// Of the gates tanh(a) sigmoid(b) and a sigmoid(b).
template <class V>
FASTELBO_INLINE void tanh_sigmoid_gradient(V a, V b, V upstream, V& d_a, V& d_b) {
  V t = tanh(a), s = sigmoid(b);
  d_a = upstream * s * (V(1.0f) - t * t);
  d_b = upstream * t * s * (V(1.0f) - s);
}
template <class V>
FASTELBO_INLINE void glu_gradient(V a, V b, V upstream, V& d_a, V& d_b) {
  V s = sigmoid(b);
  d_a = upstream * s;
  d_b = upstream * a * s * (V(1.0f) - s);
}
