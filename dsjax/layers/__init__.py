"""The layers of DeepSeek-V2.

Local arrays carry their logical dims as a suffix, and einsum letters are the same letters:

    B  sequences of the batch        T  query positions           S  key positions
    D  residual stream (hidden_dim)  H  heads                     W  vocabulary
    N  head width without position   R  rotated head width        V  value head width
    Q  query latent (q_lora_rank)    C  key and value latent (kv_lora_rank)
    E  routed experts                K  experts a token is sent to
    G  expert groups                 F  hidden width of an MLP or expert
    M  rows sorted by expert         P  pages of a sequence

Among experts a device's tokens lie flat: x_ND are N of its own, x_RD are R that reached it. A row
of tokens that `extend` reads is x_BTD with B = 1; each of its parts has B sequences.

Parameters carry no suffix; their logical dims are the `dims` metadata of each `nnx.Param`, which
`dsjax.mesh.rules` maps to mesh axes.
"""
