-- What failed and why: the models whose newest run failed, with the first of the runs in a row that
-- did, and how many these are.
with good as (
    select output, max(started_at) as last_at from models where outcome <> 'failed' group by output
),
failures as (
    select models.* from models left join good on good.output = models.output
    where models.outcome = 'failed'
        and (good.last_at is null or models.started_at > good.last_at)
)
select output, max_by(model, started_at) as model, max_by(stage, started_at) as stage,
    max_by(error, started_at) as error, max_by(hint, started_at) as hint,
    min(started_at) as failed_since, count(*) as runs
from failures group by output
order by output
