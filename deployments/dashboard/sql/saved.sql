-- The size saved in all, by what was made last of each model.
with newest as (
    select output, max_by(float_size_bytes, run_id) as float_size_bytes,
        max_by(size_bytes, run_id) as size_bytes
    from models where outcome <> 'failed' group by output
)
select count(*) as models, sum(float_size_bytes) as float_size_bytes,
    sum(size_bytes) as size_bytes, sum(float_size_bytes - size_bytes) as saved_bytes
from newest
