from graphc.codegen import cuda_vocabulary as v

warp = v.warp
to_int32 = v.cast("int32")
warps = v.warps
lane = v.lane
load = v.load
minus_inf = -float("inf")
to_float32 = v.cast("float32")
maximum = v.maximum
warp_max = v.warp_fold("max")
sub = v.sub
exp = v.exp
add = v.add
warp_sum = v.warp_fold("sum")
div = v.div
store = v.store


def kernel(in0, out0, points0, n_r0_0, s_i_0, s_i_1):
    i = to_int32(warp())
    while i < points0:
        at_in0_0 = to_int32(i * s_i_0)
        acc_0 = to_float32(minus_inf)
        r0 = lane()
        while r0 < n_r0_0:
            at_in0_2 = to_int32(at_in0_0 + r0)
            in0_1 = load(in0, at_in0_2)
            acc_0 = maximum(acc_0, in0_1)
            r0 = to_int32(r0 + 32)
        max_0 = warp_max(acc_0)
        acc_1 = to_float32(0.0)
        r0 = lane()
        while r0 < n_r0_0:
            at_in0_3 = to_int32(at_in0_0 + r0)
            in0_2 = load(in0, at_in0_3)
            sub_1 = sub(in0_2, max_0)
            exp_1 = exp(sub_1)
            acc_1 = add(acc_1, exp_1)
            r0 = to_int32(r0 + 32)
        sum_0 = warp_sum(acc_1)
        at_out0_0 = to_int32(i * s_i_1)
        r0 = lane()
        while r0 < n_r0_0:
            at_in0_1 = to_int32(at_in0_0 + r0)
            in0_0 = load(in0, at_in0_1)
            sub_0 = sub(in0_0, max_0)
            exp_0 = exp(sub_0)
            div_0 = div(exp_0, sum_0)
            at_out0_1 = to_int32(at_out0_0 + r0)
            store(out0, at_out0_1, div_0)
            r0 = to_int32(r0 + 32)
        i = to_int32(i + warps())
