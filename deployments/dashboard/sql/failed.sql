-- What failed and why: the models whose newest run failed, with the first of the runs in a row that
-- did, and how many these are.
with good as (
    select output, max(run_id) as last_run from models where outcome <> 'failed' group by output
),
failures as (
    select models.* from models left join good on good.output = models.output
    where models.outcome = 'failed'
        and (good.last_run is null or models.run_id > good.last_run)
)
select output, max_by(model, run_id) as model, max_by(stage, run_id) as stage,
    max_by(error, run_id) as error, max_by(hint, run_id) as hint,
    min_by(started_at, run_id) as failed_since, count(*) as runs
from failures group by output
order by output
