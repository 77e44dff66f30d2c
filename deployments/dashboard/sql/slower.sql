-- What got slower since last week: the newest speed-up of each model is more than a tenth below the
-- newest one that is at least six days older. Timings of a busy host do not count.
with measured as (
    select output, model, run_id, started_at, speedup from models
    where outcome = 'done' and speedup is not null and busy is not true
    union all
    select output, model, run_id, started_at, speedup from audits
    where speedup is not null and busy is not true
),
newest as (
    select output, max_by(started_at, run_id) as started_at, max_by(model, run_id) as model,
        max_by(speedup, run_id) as speedup
    from measured group by output
),
compared as (
    select newest.output, newest.model, newest.speedup as speedup_now,
        max_by(earlier.speedup, earlier.run_id) as speedup_before
    from newest join measured as earlier on earlier.output = newest.output
        and earlier.started_at <= newest.started_at - interval 6 day
    group by newest.output, newest.model, newest.speedup
)
select output, model, speedup_before, speedup_now from compared
where speedup_now < 0.9 * speedup_before
order by speedup_now / speedup_before, output
