-- What got less right since last week: the newest accuracy of each model is below the newest one
-- that is at least six days older and in the same metric.
with measured as (
    select output, model, started_at, metric, accuracy from models
    where outcome = 'done' and accuracy is not null
    union all
    select output, model, started_at, metric, accuracy from audits
    where accuracy is not null
),
newest as (
    select output, max(started_at) as started_at, max_by(model, started_at) as model,
        max_by(metric, started_at) as metric, max_by(accuracy, started_at) as accuracy
    from measured group by output
),
compared as (
    select newest.output, newest.model, newest.metric, newest.accuracy as accuracy_now,
        max_by(earlier.accuracy, earlier.started_at) as accuracy_before
    from newest join measured as earlier on earlier.output = newest.output
        and earlier.metric = newest.metric
        and earlier.started_at <= newest.started_at - interval 6 day
    group by newest.output, newest.model, newest.metric, newest.accuracy
)
select output, model, metric, accuracy_before, accuracy_now from compared
where accuracy_now < accuracy_before
order by accuracy_now - accuracy_before, output
