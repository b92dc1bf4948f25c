"""Plan a model for a machine that is only described: where its bytes go, how fast it would run. Loads no weights."""

from dsv2_local.architectures.released import read_config
from dsv2_local.errors import PlanError
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.offload import forecast
from dsv2_local.offload.plan import make_plan
from dsv2_local.offload.plan_request import Machine, PlanRequest, Rates
from dsv2_local.quant.schema import Recipe

GIB = 1 << 30


def main() -> None:
    config = read_config("deepseek-v2")  # the 236B model's shape; a path to a config.json works too
    request = PlanRequest(config, Recipe.NF4, context=32_768, cache_dtype=CacheDtype.INT8)
    # One GPU of 24 GiB, 192 GiB of RAM; rates in GB/s. What is left out of Rates is assumed, not measured.
    machine = Machine(vram=(24 * GIB,), ram=192 * GIB, rates=Rates(ram=80, link=25, vram=900))

    plan = make_plan(request, machine)
    for memory in (*plan.gpus, plan.ram):
        print(f"{memory.name}: {memory.used / GIB:.1f} of {memory.capacity / GIB:.0f} GiB")
        for part, size in memory.parts.items():
            print(f"    {part:<22} {size / GIB:7.2f} GiB")
    print(f"routed experts: {plan.slots:,} of {plan.experts:,} have a slot in GPU memory, mode {plan.mode}")

    expected = forecast.forecast(plan)
    print(f"decode: about {expected.decode_tok_s:.1f} tok/s, bound by {expected.bound}")
    print(f"prefill: about {expected.prefill_tok_s:,.0f} tok/s")
    for note in forecast.notes(plan):  # what slows it down, and what would help
        print(f"note: {note}")

    try:
        make_plan(request, Machine(vram=(), ram=8 * GIB))
    except PlanError as error:  # says which memory is too small, by how much, and what would make it fit
        print(f"8 GiB of RAM and no GPU: {error}")


if __name__ == "__main__":
    main()
