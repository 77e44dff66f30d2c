-- What got less accurate since last week: the newest accuracy of each model is below the newest one
-- that is at least six days older and in the same metric.
with measured as (
    select output, model, run_id, started_at, metric, accuracy from models
    where outcome = 'done' and accuracy is not null
    union all
    select output, model, run_id, started_at, metric, accuracy from audits
    where accuracy is not null
),
newest as (
    select output, max_by(started_at, run_id) as started_at, max_by(model, run_id) as model,
        max_by(metric, run_id) as metric, max_by(accuracy, run_id) as accuracy
    from measured group by output
),
compared as (
    select newest.output, newest.model, newest.metric, newest.accuracy as accuracy_now,
        max_by(earlier.accuracy, earlier.run_id) as accuracy_before
    from newest join measured as earlier on earlier.output = newest.output
        and earlier.metric = newest.metric
        and earlier.started_at <= newest.started_at - interval 6 day
    group by newest.output, newest.model, newest.metric, newest.accuracy
)
select output, model, metric, accuracy_before, accuracy_now from compared
where accuracy_now < accuracy_before
order by accuracy_now - accuracy_before, output
