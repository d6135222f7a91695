"""The Ascend-style target: tile programs for Huawei's NPUs, compile-checked by bishengir and simulated on x86."""
